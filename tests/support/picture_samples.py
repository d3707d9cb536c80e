"""Pictures, and a transform and a tokenizer, that preserve the identity of samples."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from clipup.data.loaders import train_loader


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(number: int) -> bytes:
    """A 4 x 4 picture whose red is `number`."""
    return encoded(Image.new("RGB", (4, 4), (number, 0, 0)))


def write_tar(path: Path, members) -> Path:
    """A tar file of (name, content); a content of (type, target) is a link or another special member."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    return path


def preprocess(image) -> Tensor:
    """[3, H, W] float32, the colours as they are."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()


def noisy(image) -> Tensor:
    """The picture, with random numbers of all three generators below its integer value."""
    noise = torch.rand(()) / 4 + random.random() / 8 + numpy.random.rand() / 8
    return preprocess(image) + noise


def tokenizer(texts) -> Tensor:
    """ "7 2" becomes [7, 2]."""
    texts = [texts] if isinstance(texts, str) else texts
    return torch.tensor([[int(number) for number in text.split()] for text in texts])


def samples_of(batches) -> list[tuple[int, int, int]]:
    """(picture's number, caption's number, caption's variant) of every sample, in order."""
    return [
        (int(image[0, 0, 0]), int(text[0]), int(text[1]))
        for images, texts in batches
        for image, text in zip(images, texts, strict=True)
    ]


def load(kind, source, batch_size=3, workers=0, transform=preprocess, tokenize=tokenizer, count=24, **options):
    """Training data of a kind."""
    usual = {
        "progress": False,
        "cache": "cached" in kind,
        **({"train_num_samples": count} if kind == "streamed" else {}),
    }
    return train_loader(source, transform, tokenize, batch_size, workers, **usual | options)


def epoch_of(data, epoch=0):
    """(picture's number, caption's number, caption's variant) of every sample of an epoch."""
    data.set_epoch(epoch)
    return samples_of(data.dataloader)


def pictures_of(data, epoch=0):
    return [picture for picture, _, _ in epoch_of(data, epoch)]
