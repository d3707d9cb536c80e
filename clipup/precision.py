"""Precision names as in open_clip, autocast, devices, and the number of data workers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["fp32", "amp", "amp_bf16", "bf16"]
"""amp: float16 autocast. amp_bf16: bfloat16 autocast. bf16: the model itself is in bfloat16."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context manager for a forward pass in this precision."""
    import torch

    if not precision.startswith("amp"):
        return nullcontext()
    return torch.autocast(device.type, dtype=token_dtype(precision))


def image_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype to convert images to, None for no conversion."""
    return token_dtype(precision) if precision == "bf16" else None


def token_dtype(precision: Precision) -> torch.dtype:
    """The type in which sparse layers compute."""
    import torch

    return {"fp32": torch.float32, "amp": torch.float16}.get(precision, torch.bfloat16)


def check_device(device: str) -> str:
    """The device; of "auto" cuda if torch finds a GPU, else cpu.

    Raises:
        ValueError: not the name of a device, or a CUDA device where torch finds none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA GPU; use --device cpu")
    return device


def default_workers() -> int:
    """Number of data loader processes: four, or one per core on machines with fewer cores."""
    return min(4, cores())


def cores() -> int:
    """CPUs that this process may run on; taskset, Slurm and containers may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on x's device, None if autocast is off. As in torch, float64 is not cast."""
    import torch

    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
