"""Weights packed ahead for inference on CPUs: made by name, held by whoever made them, never by this package.

A product reads its right operand in panels of columns. From a plain weight the kernels make them at every call; from a
packed one they read them. The results are bitwise the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import extension, select_cpu
from ..backends.cpp import DTYPE_CODE
from ..types import PLAIN_LAYOUT, PackedWeight


def packed_layout(dtype: torch.dtype) -> str:
    """``PackedWeight.layout`` of what ``pack_weight`` makes of ``dtype`` on this CPU; the ops take no other layout."""
    return select_cpu.packed_layout(dtype)


def pack_weight(weight: Tensor) -> PackedWeight:
    """A copy of ``weight`` in the order in which this CPU's kernels read it.

    Args:
        weight: [E, O, I], or [O, I] of one MLP, on the CPU: float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a weight on another device.
    """
    dims = weight.dim() if isinstance(weight, Tensor) else 3
    checks.tensor("weight", weight, ("O", "I") if dims == 2 else ("E", "O", "I"), checks.FLOATING, weight)
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}; weights are packed for CPUs, move it there first")
    shape = tuple(weight.shape)
    layout = select_cpu.packed_layout(weight.dtype)
    weight = weight.detach().resolve_neg()
    if layout == PLAIN_LAYOUT:  # torch's products round by strides too, so they are kept
        return PackedWeight(weight.clone(), shape, weight.dtype, PLAIN_LAYOUT)
    weight = weight.contiguous()
    code, sizes = DTYPE_CODE[weight.dtype], (1, *shape)[-3:]
    memory = extension.NATIVE.Block(max(extension.NATIVE.packed_weight_bytes(code, *sizes), 1))  # in huge pages
    block = torch.frombuffer(memory, dtype=torch.uint8)
    extension.NATIVE.pack_weight(code, weight.data_ptr(), *sizes, block.data_ptr())
    return PackedWeight(block, shape, weight.dtype, layout)


def unpack_weight(packed: PackedWeight) -> Tensor:
    """A copy of the weight that was packed, bit for bit, whichever kernels it was packed for.

    Raises:
        TypeError: ``packed`` is no PackedWeight.
    """
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed must be the PackedWeight that pack_weight() returns, got {type(packed).__name__}")
    if packed.layout == PLAIN_LAYOUT:
        return packed.block.clone()
    if 0 in packed.shape:
        return torch.empty(packed.shape, dtype=packed.dtype)
    word, panel = packed.layout.rsplit("x", 1)
    stored, per_word = (torch.float32, 1) if word == "float32" else (torch.bfloat16, 2)
    experts, rows, columns = (1, *packed.shape)[-3:]
    panels = -(-rows // int(panel))
    strips = packed.block.view(stored).view(experts, panels, -1, int(panel), per_word)
    weight = strips.permute(0, 1, 3, 2, 4).reshape(experts, panels * int(panel), -1)[:, :rows, :columns]
    return weight.to(packed.dtype).reshape(packed.shape).clone()
