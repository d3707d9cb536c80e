"""Pictures, and a transform and a tokenizer, that preserve the identity of samples."""

from __future__ import annotations

import io

import numpy
import torch
from PIL import Image
from torch import Tensor


def png(number: int) -> bytes:
    """A 4 x 4 picture whose red is `number`."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def preprocess(image) -> Tensor:
    """[3, H, W] float32, the colours as they are."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()


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
