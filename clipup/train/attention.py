"""Which of torch's attention kernels a training step uses on a CPU."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..precision import Precision

SHORT = 64
"""Sequence length up to which plain matrix products beat the flash kernel in bfloat16 on a CPU, forward and backward
(with a mask also longer ones; docs/performance_log.md)."""


def attention_kernel(model: nn.Module, device: torch.device, precision: Precision) -> AbstractContextManager:
    """The context for a step, including its backward pass, which may recompute the forward.

    In bfloat16 the backward pass of torch's flash kernel for CPUs takes two to four times as long as plain matrix
    products when sequences are short. In all other cases the choice is torch's own.
    """
    if device.type == "cpu" and precision in ("amp_bf16", "bf16") and _longest_sequence(model) <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _longest_sequence(model: nn.Module) -> float:
    """The longer sequence length of a CLIP's two towers; infinite if it is unknown."""
    grid = getattr(getattr(model, "visual", None), "grid_size", None)
    text = getattr(model, "context_length", None)
    return math.inf if grid is None or text is None else max(math.prod(grid) + 1, text)
