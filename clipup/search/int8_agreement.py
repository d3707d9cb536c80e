"""Whether a model finds the same in photographs with its weights in int8, measured on some of the user's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..evaluate.encode import encode_images
from ..inference.accelerate import NothingToPrepare, accelerate

_LEAST_MEAN, _LEAST = 0.995, 0.98


def compare_int8(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float] | None:
    """How well features in int8 agree with those in float32: the number of ``images`` compared, and ``mean`` and
    ``least`` of their cosines. None where nothing can be computed in int8, or without images.

    Int8 is that of ``accelerate`` without ``calibrate``. Calibrated features would depend on the images of the
    calibration, which may be gone when images are added to the index, or another one is searched by.

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


def int8_agrees(agreement: dict[str, float] | None) -> bool:
    """Whether to encode in int8: where the cosines of ``compare_int8`` are 0.995 on average and 0.98 at least."""
    return agreement is not None and agreement["mean"] >= _LEAST_MEAN and agreement["least"] >= _LEAST
