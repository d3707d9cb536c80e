"""The model of an index: which model encodes images and queries, in which precision, and how it reads images."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from torchvision.transforms import Compose

from ..checks import check
from ..data.evaluation import EvalSamples
from ..data.images import resize_of, upright
from ..data.samples import Sample
from ..data.skips import Skips
from ..evaluate.encode import encode_images, encode_texts
from ..inference.accelerate import NothingToPrepare, accelerate, for_inference
from ..inference.int8_tensors import int8_tensors
from ..inference.prepared import quantization
from ..models import factory, hub, model_names, tokenizers
from ..precision import Precision
from ..progress import progress

DEFAULT_MODEL = ("ViT-B-32-256", "datacomp_s34b_b86k")
"""Name and weights of the model for photographs."""
_COMPARED = 128
"""Images, at most, on which int8 is tried."""
_LEAST_MEAN, _LEAST = 0.995, 0.98
"""Cosines of ``compare_int8`` with which an index is in int8."""


@dataclass(frozen=True)
class Encoder:
    """The model that computed an index's features, and how. Indexes of different encoders do not mix. The digest
    identifies the model, wherever its files are."""

    model: str = field(compare=False)
    """Model name, or the absolute path of its directory."""
    pretrained: str | None = field(compare=False)
    precision: Precision
    int8: bool
    model_digest: str
    """``digest`` of the model."""
    int8_agreement: dict[str, float] | None = field(default=None, compare=False)
    """``compare_int8`` on images of the index; None if none were compared."""

    def __str__(self) -> str:
        weights = f" with the weights {self.pretrained}" if self.pretrained else ""
        return f"{self.model}{weights} in {self.precision}{' and int8' * self.int8} (checksum {self.model_digest[:8]})"

    def place(self) -> tuple[str, str | None]:
        """Name and weights, to load the model again.

        Raises:
            FileNotFoundError: they are files that are not there any more.
        """
        for file in (self.model.removeprefix(model_names.LOCAL_PREFIX), self.pretrained or ""):
            if os.path.isabs(file) and not os.path.exists(file):
                raise FileNotFoundError(
                    f"the index was made with the model {file}, which is not there any more; if it has moved, call "
                    "clipup index again and name its new place (model, pretrained)"
                )
        return self.model, self.pretrained


def digest(model: nn.Module, name: str) -> str:
    """A checksum of what features depend on: a model's weights by their names, types and values, its config, its
    transform of images, and the files of its tokenizer.

    Args:
        name: of the model, for config and tokenizer: as in ``clipup.create_model_and_transforms``.
    """
    checksum = hashlib.blake2b(digest_size=16)
    model_cfg = model_names.get_model_config(name)
    transform = getattr(model.visual, "preprocess_cfg", None)
    checksum.update(json.dumps([model_cfg, transform], sort_keys=True).encode())
    files = tokenizers.files_of(model_cfg["text_cfg"], tokenizers.source_directory(name))
    for file, content in sorted(files.items()):
        checksum.update(f"\n{file} {len(content)}\n".encode() + content)
    tensors = model.state_dict() if quantization(model) is None else int8_tensors(model)
    for name, value in sorted(tensors.items()):
        checksum.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        checksum.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()


class LoadedEncoder(NamedTuple):
    """The model of an encoder, ready to encode."""

    encoder: Encoder
    model: nn.Module
    preprocess: Callable[[Any], Tensor]

    def images(self, images: Iterable[Tensor], batch_size: int = 64) -> Tensor:
        """Preprocessed images [3, height, width] -> features [N, D] of length 1."""
        return encode_images(self.model, images, batch_size, self.encoder.precision)

    def image_file(self, path: Path) -> Tensor:
        """Features [1, D] of an image file.

        Raises:
            ValueError: it cannot be read.
        """
        records = [Sample(str(path), str(path), ())]
        return self.images(image for image, *_ in upright_samples(records, self.preprocess, Skips(), strict=True))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of length 1."""
        return encode_texts(
            self.model, texts, tokenizers.get_tokenizer(self.encoder.model), precision=self.encoder.precision
        )


def load_encoder(
    earlier: Encoder | None,
    records: Sequence[Sample] = (),
    model: str | None = None,
    pretrained: str | None = None,
    precision: Precision | Literal["int8"] | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], object] = print,
) -> LoadedEncoder:
    """The encoder of an index: the model and precision of the earlier index unless others are given. For a new index
    they are the default model, in int8 if that agrees with float32 on some of the images.

    Args:
        earlier: of the index that is searched or brought up to date; None for a new index.
        records: images of a new index, to try int8 on.
        device: for a model that is not in int8, which runs on the CPU.
        say: called with what to know about the model before it is loaded.

    Raises:
        FileNotFoundError: the files of the earlier index's model are not there any more.
        ValueError: a model without weights, or an unknown model.
    """
    base = earlier or Encoder(*DEFAULT_MODEL, "fp32", False, "")
    name, weights = (model or DEFAULT_MODEL[0], pretrained) if model or pretrained else base.place()
    model_names.refuse_random_weights("pretrained", name, weights)
    if earlier is None and model_names.get_model_config(name)["text_cfg"].get("hf_tokenizer_name") == "words:icons":
        say(f"{name} was trained on icons, and finds little in photographs")
    repository = open_clip.get_pretrained_cfg(*DEFAULT_MODEL)["hf_hub"].rstrip("/")
    if (name, weights) == DEFAULT_MODEL and not hub.is_cached(repository):
        say(f"downloads {name} (151 M parameters, about 605 MB)")
    int8, floats, agreement = base.int8, base.precision, base.int8_agreement
    if precision is not None:
        int8, floats, agreement = precision == "int8", "fp32" if precision == "int8" else precision, None
    device = "cpu" if int8 else device
    clip, _, preprocess = factory.create_model_and_transforms(name, weights, precision=floats, device=device)
    model_digest = digest(clip, name)
    if quantization(clip) is not None:
        check("precision", precision, precision != "fp32", "int8 or None: the model is in int8")
        int8, agreement = True, None
    elif earlier is None and precision is None and device == "cpu":
        compared = random.Random(0).sample(records, min(_COMPARED, len(records)))
        batches = upright_samples(compared, preprocess, Skips()).batches(batch_size, workers)
        agreement = compare_int8(clip, (images for images, *_ in progress(batches, "trying int8", "batches")))
        int8 = agreement is not None and agreement["mean"] >= _LEAST_MEAN and agreement["least"] >= _LEAST
    directory = model_names.directory_of(name)
    name = name if directory is None else f"{model_names.LOCAL_PREFIX}{directory.resolve()}"
    weights = str(Path(weights).resolve()) if weights is not None and Path(weights).is_file() else weights
    return LoadedEncoder(
        Encoder(name, weights, floats, int8, model_digest, agreement),
        for_inference(clip, floats, "int8" if int8 else None),
        preprocess,
    )


def compare_int8(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float] | None:
    """How well features in int8 agree with those in float32: the number of ``images`` compared, and ``mean`` and
    ``least`` of their cosines. None where nothing can be computed in int8, or without images.

    Int8 is that of ``accelerate`` without ``calibrate``. Calibrated features would depend on the images of the
    calibration, which may be gone when images are added to the index, or when a query is another image.

    Args:
        model: plain, in float32, on the CPU; it is not changed.
        batches: preprocessed images [B, 3, height, width].
    """
    try:
        quantized = accelerate(model, weights="int8")
    except (NothingToPrepare, RuntimeError):  # RuntimeError: no kernel here multiplies int8
        return None
    cosines = [(encode_images(model, images) * encode_images(quantized, images)).sum(-1) for images in batches]
    if not cosines:
        return None
    joined = torch.cat(cosines)
    return {"images": len(joined), "mean": joined.mean().item(), "least": joined.min().item()}


def upright_samples(
    records: Sequence[Sample], preprocess: Callable[[Any], Tensor], skips: Skips, strict: bool = False
) -> EvalSamples:
    """Images as an index reads them: turned as their EXIF orientation says, JPEGs decoded at a smaller scale.

    Args:
        strict: an unreadable one raises ValueError, which names it.
    """
    return EvalSamples(records, Compose([upright, preprocess]), skips, strict, resize=resize_of(preprocess))
