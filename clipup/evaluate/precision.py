"""open_clip's names for precisions: what runs under autocast, and which type images have."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Literal

import open_clip
import torch
from open_clip_train.precision import get_autocast
from torch import nn

from ..accelerate import NothingToPrepare, accelerate

Precision = Literal["fp32", "amp", "amp_bf16", "bf16"]
"""amp: float16 autocast; amp_bf16: bfloat16 autocast; bf16: the model itself is in bfloat16."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context that a forward runs in."""
    return get_autocast(precision, device_type=device.type)()


def image_dtype(precision: Precision) -> torch.dtype | None:
    """The type that images are converted to; None leaves them as they are."""
    return open_clip.get_input_dtype(precision)


def for_inference(model: nn.Module, precision: Precision = "fp32") -> nn.Module:
    """The model itself, prepared (``clipup.accelerate``) where that is faster: on a CPU and outside of autocast, which
    would cast weights that are packed already. In evaluation mode in any case."""
    model.eval()
    if next(model.parameters()).device.type != "cpu" or precision in ("amp", "amp_bf16"):
        return model
    try:
        return accelerate(model, inplace=True)
    except NothingToPrepare:
        return model


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: it is no device's name, or a CUDA GPU, and torch finds none.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA GPU; use --device cpu")


def default_workers() -> int:
    """Data loader processes: four, or one a core where there are fewer."""
    return min(4, os.cpu_count() or 1)
