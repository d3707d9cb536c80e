"""Which of torch's attention kernels a training step takes on a CPU."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..precision import Precision

SHORT = 64
"""Tokens up to which plain products beat the flash kernel in bfloat16 on a CPU, forward and backward (with a mask
longer ones too; docs/performance_log.md)."""


def attention_kernel(model: nn.Module, device: torch.device, precision: Precision) -> AbstractContextManager:
    """The context that a step runs in, backward too: its forward may be computed again there.

    In bfloat16 the backward pass of torch's flash kernel for CPUs takes two to four times as long as plain matrix
    products when sequences are short; elsewhere torch's own choice stands.
    """
    if device.type == "cpu" and precision in ("amp_bf16", "bf16") and _longest_sequence(model) <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _longest_sequence(model: nn.Module) -> float:
    """Tokens of the longer tower of a CLIP; infinite where a tower does not say."""
    grid = getattr(getattr(model, "visual", None), "grid_size", None)
    text = getattr(model, "context_length", None)
    return math.inf if grid is None or text is None else max(math.prod(grid) + 1, text)
