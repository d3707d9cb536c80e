"""Weights packed once for inference on CPUs. The caller holds them; this package caches none.

A product reads its right operand as B panels (csrc/cpu/kernels.h). From a plain weight the kernels pack them at every
call; a packed weight already has them. The results are bitwise the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import checks
from ..backends import cpp, extension, registry
from ..types import PLAIN_LAYOUT, PackedWeight


def packed_layout(dtype: torch.dtype) -> str:
    """The layout that ``pack_weight`` gives a weight of ``dtype`` on this CPU, and the only one that the ops take."""
    return _layout(dtype)


@functools.cache
def _layout(dtype: torch.dtype) -> str:
    backend = registry.choose("expert_mlp_forward", dtype, "cpu").backend
    return cpp.packed_layout(dtype) if backend.name == "cpp" else PLAIN_LAYOUT


def check_layout(dtype: torch.dtype, layout: str) -> None:
    """Refuses a weight packed for other kernels than this process runs."""
    checks.layout(layout, _layout(dtype))


def pack_weight(weight: Tensor) -> PackedWeight:
    """A copy of ``weight``, packed for this CPU's kernels.

    Args:
        weight: [E, O, I], or [O, I] for one MLP, on the CPU: float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a weight on another device.
    """
    dims = weight.dim() if isinstance(weight, Tensor) else 3
    checks.tensor("weight", weight, ("O", "I") if dims == 2 else ("E", "O", "I"), checks.FLOATING, weight)
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}; weights are packed for CPUs, move it there first")
    shape = tuple(weight.shape)
    layout = _layout(weight.dtype)
    weight = weight.detach().resolve_neg()
    if layout == PLAIN_LAYOUT:  # how torch's products round depends on strides, so these are kept
        return PackedWeight(weight.clone(), shape, weight.dtype, PLAIN_LAYOUT)
    weight = weight.contiguous()
    code, sizes = cpp.DTYPE_CODE[weight.dtype], (1, *shape)[-3:]
    memory = extension.NATIVE.Block(max(extension.NATIVE.packed_weight_bytes(code, *sizes), 1))  # in huge pages
    block = torch.frombuffer(memory, dtype=torch.uint8)
    extension.NATIVE.pack_weight(code, cpp.address(weight), *sizes, block.data_ptr())
    return PackedWeight(block, shape, weight.dtype, layout)


def unpack_weight(packed: PackedWeight) -> Tensor:
    """A bitwise copy of the original weight, for any layout.

    Raises:
        TypeError: ``packed`` is not a PackedWeight.
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
    b_panels = packed.block.view(stored).view(experts, panels, -1, int(panel), per_word)
    weight = b_panels.permute(0, 1, 3, 2, 4).reshape(experts, panels * int(panel), -1)[:, :rows, :columns]
    return weight.to(packed.dtype).reshape(packed.shape).clone()
