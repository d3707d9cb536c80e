"""The forward pass of a step: a model's output by name, and its attention kernel."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..precision import Precision
from .objectives.objective import named_output

SHORT = 64
"""Sequence length up to which plain matrix products beat the flash kernel in bfloat16 on a CPU, forward and backward
(with a mask also longer sequences; docs/performance_log.md)."""


def forward(model: nn.Module, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The model's output by name; row i of the image and of the text features belongs to pair i.

    Of a CoCa, logits and the tokens that they should predict: open_clip 3 returns both, open_clip 4 the logits.
    """
    output = named_output(model(images, texts))
    if "logits" in output and "labels" not in output:
        output |= {"logits": output["logits"][:, :-1], "labels": texts[:, 1:]}
    return output


def attention_kernel(model: nn.Module, device: torch.device, precision: Precision) -> AbstractContextManager:
    """The context for a step, including its backward pass, which may recompute the forward.

    In bfloat16 the backward pass of torch's flash kernel for CPUs takes two to four times as long as plain matrix
    products when sequences are short. In all other cases the choice is torch's own.
    """
    grid = getattr(getattr(model, "visual", None), "grid_size", None)
    text = getattr(model, "context_length", None)
    longest = math.inf if grid is None or text is None else max(math.prod(grid) + 1, text)
    plain = device.type == "cpu" and precision in ("amp_bf16", "bf16") and longest <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
