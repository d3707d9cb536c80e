"""The forward pass of a step: a model's output by name, shuffled texts where capacity goes by position, attention.

Under a capacity an expert's slots go to tokens by their position in the batch, so which tokens are dropped depends on a
sample's row. If the image and the text of a pair were in the same row, both towers could tell the row from what was
dropped, and would learn to match rows instead of contents: the loss falls far below chance even on unrelated images and
texts, and none of that transfers to evaluation. So the text tower gets the texts in a random order.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..moe.layer import moe_layers
from ..precision import Precision

SCALES = ("logit_scale", "logit_bias")
"""Outputs with one value for the whole batch; the others have one row per pair."""
SHORT = 64
"""Sequence length up to which plain matrix products beat the flash kernel in bfloat16 on a CPU, forward and backward
(with a mask also longer ones; docs/performance_log.md)."""


def named_output(output: Any) -> dict[str, Tensor]:
    """A CLIP's output by open_clip's names, whether the model returns a dict or a tuple."""
    if isinstance(output, dict):
        return dict(output)
    return dict(zip(("image_features", "text_features", *SCALES), output, strict=False))


def drops_by_position(model: nn.Module) -> bool:
    """Whether some sparse layer chooses the tokens that it drops in training by their position in the batch."""
    configs = (layer.config for layer in moe_layers(model).values())
    return any(config.capacity_factor is not None and not config.priority for config in configs)


def forward(model: nn.Module, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The model's output by name; row i of the image and of the text features belongs to pair i."""
    if not drops_by_position(model):
        return _with_labels(named_output(model(images, texts)), texts)
    order = torch.randperm(len(texts)).to(texts.device, non_blocking=True)
    output = _with_labels(named_output(model(images, texts[order])), texts[order])
    output["text_features"] = output["text_features"][order.argsort()]
    return output


def _with_labels(output: dict[str, Tensor], texts: Tensor) -> dict[str, Tensor]:
    """Of a CoCa, logits and the tokens that they should predict: open_clip 3 returns both, open_clip 4 the logits."""
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
