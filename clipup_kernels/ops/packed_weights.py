"""Weights packed once for inference on CPUs. The caller holds them; this package caches none.

A product reads its right operand as B panels (csrc/cpu/kernels.h). From a plain weight the kernels pack them at every
call; a packed weight already has them. The results are bitwise the same unless it is quantized.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import cpp, extension, registry
from ..types import PLAIN_LAYOUT, PackedWeight, quantization_of


@functools.cache
def packed_layout(dtype: torch.dtype, quantize: str | None = None) -> str:
    """The layout that ``pack_weight`` gives a weight of ``dtype`` on this CPU, and the only layout that the ops take.

    Raises:
        ValueError: ``quantize`` is unknown.
        RuntimeError: no kernel here multiplies quantized weights.
    """
    checks.quantization(quantize)
    if quantize is not None:  # chosen by the op itself: no other backend has it
        registry.choose("packed_expert_mlp", dtype, "cpu")
        return cpp.packed_layout(dtype, quantize)
    backend = registry.choose("expert_mlp_forward", dtype, "cpu").backend
    return cpp.packed_layout(dtype) if backend.name == "cpp" else PLAIN_LAYOUT


def check_layout(dtype: torch.dtype, layout: str) -> None:
    """Refuses a weight packed for other kernels than this process runs."""
    runs = packed_layout(dtype, quantization_of(layout))
    if layout != runs:
        raise ValueError(
            f"the weight was packed as {layout}, but the kernels of this process read {runs}; pack the weight again "
            "here: pack_weight(packed)"
        )


def pack_weight(
    weight: Tensor | PackedWeight,
    quantize: str | None = None,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
) -> PackedWeight:
    """A copy of ``weight``, packed for this CPU's kernels.

    With ``quantize="int8"``, an output channel is stored as ``round(w / s)`` with ``s = max|w| / 127``: half of
    bfloat16's size. The ops then quantize every row of their input in the same way, and sum in integers (vector-wise
    quantization, LLM.int8, arXiv 2208.07339, section 3.1).

    Args:
        weight: [E, O, I], or [O, I] for one MLP, on the CPU: float32, bfloat16, float16 or, if it is not quantized,
            float64. Or a weight that was packed for another CPU; it keeps its values.
        quantize: None or "int8".
        input_scale: [E, I] or [I] float32, for a quantized weight: ``w / input_scale`` and ``x * input_scale`` are
            quantized, so that inputs that are large in few places cost less precision (SmoothQuant, arXiv 2211.10438).
            ``gate_weight`` needs the scale of ``in_weight``.
        input_offset: the same for what is subtracted from inputs before they are scaled, so that what all rows have in
            common costs no precision. The product is that of ``x - input_offset``: the bias has to hold the rest,
            ``weight @ input_offset``.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a weight on another device.
        RuntimeError: no kernel here multiplies quantized weights: float64, or no compiled extension.
    """
    if isinstance(weight, PackedWeight):
        others = {"quantize": quantize, "input_scale": input_scale, "input_offset": input_offset}
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{given[0]} must be None for a weight that is packed already")
        return _repack(weight)
    dims = weight.dim() if isinstance(weight, Tensor) else 3
    checks.tensor("weight", weight, ("O", "I") if dims == 2 else ("E", "O", "I"), checks.FLOATING, weight)
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}; weights are packed for CPUs, move it there first")
    shape = tuple(weight.shape)
    layout = packed_layout(weight.dtype, quantize)
    weight = weight.detach().resolve_neg()
    input_scale, input_offset = (
        value if value is None else _of_inputs(name, value, weight, quantize)
        for name, value in (("input_scale", input_scale), ("input_offset", input_offset))
    )
    if layout == PLAIN_LAYOUT:  # how torch's products round depends on strides, so these are kept
        return PackedWeight(weight.clone(), shape, weight.dtype, PLAIN_LAYOUT)
    weight = weight.contiguous()
    code, sizes, packed_type = cpp.DTYPE_CODE[weight.dtype], (1, *shape)[-3:], cpp.PACKED_TYPE[quantize]
    num_bytes = extension.NATIVE.packed_weight_bytes(code, *sizes, packed_type)
    memory = extension.NATIVE.Block(max(num_bytes, 1), lasting=True)  # in huge pages
    block = torch.frombuffer(memory, dtype=torch.uint8)
    extension.NATIVE.pack_weight(
        code,
        cpp.address(weight),
        *sizes,
        block.data_ptr(),
        packed_type,
        cpp.address(input_scale),
        cpp.address(input_offset),
    )
    return PackedWeight(block, shape, weight.dtype, layout)


def _of_inputs(name: str, value: Tensor, weight: Tensor, quantize: str | None) -> Tensor:
    """The values of all inputs of a weight, [E, I] or [I]."""
    if quantize is None:
        raise ValueError(f"{name} was given for a weight that is not quantized; pass quantize too, or neither")
    lead = () if value.dim() == 1 else weight.shape[:-2]
    checks.tensor(name, value, (*lead, weight.shape[-1]), (torch.float32,), weight)
    return value.expand(*weight.shape[:-2], -1).contiguous()


def unpack_weight(packed: PackedWeight) -> Tensor:
    """A bitwise copy of the original weight, for any layout; of a quantized one, the values that it stands for."""
    if packed.layout == PLAIN_LAYOUT:
        return packed.block.clone()
    if 0 in packed.shape:
        return torch.empty(packed.shape, dtype=packed.dtype)
    elements, scales, inputs = _parts(packed)
    if scales is not None:
        elements = elements * scales[..., None] * inputs[:, :1, : packed.shape[-1]]
    return elements.to(packed.dtype).reshape(packed.shape).clone()


_INPUT_PADDING = 32
"""Scales and shifts of an expert's inputs are padded to a multiple of this (csrc/cpu/kernels.h)."""
_WORDS = {"float32": (torch.float32, 1), "bfloat16x2": (torch.bfloat16, 2), "int8x4": (torch.int8, 4)}


def _parts(packed: PackedWeight) -> tuple[Tensor, Any, Any]:
    """The elements as they are stored, [E, O, I]; of a quantized weight also the scales, [E, O], and the scales and
    shifts of the inputs, [E, 2, padded I], else None."""
    word, panel = packed.layout.rsplit("x", 1)
    stored, per_word = _WORDS[word]
    experts, rows, columns = (1, *packed.shape)[-3:]
    channels = -(-rows // int(panel)) * int(panel)
    num_bytes = 4 * experts * channels * -(-columns // per_word)
    words = packed.block[:num_bytes].view(stored).view(experts, channels // int(panel), -1, int(panel), per_word)
    elements = words.permute(0, 1, 3, 2, 4).reshape(experts, channels, -1)[:, :rows, :columns]
    if packed.quantization is None:
        return elements, None, None
    scales, _, inputs = packed.block[num_bytes:].split(
        [4 * experts * channels, 4 * experts * channels, 8 * experts * (columns + -columns % _INPUT_PADDING)]
    )
    inputs = inputs.view(torch.float32).view(experts, 2, -1)
    return elements, scales.view(torch.float32).view(experts, channels)[:, :rows], inputs


def _repack(packed: PackedWeight) -> PackedWeight:
    """A packed weight in the layout of this CPU's kernels, with the same values."""
    layout = packed_layout(packed.dtype, packed.quantization)
    if packed.quantization is None or 0 in packed.shape:
        return pack_weight(unpack_weight(packed), packed.quantization)
    if layout == packed.layout:
        return packed._replace(block=packed.block.clone())
    elements, scales, inputs = _parts(packed)
    experts, rows, columns = elements.shape
    word, panel = layout.rsplit("x", 1)
    per_word = _WORDS[word][1]
    padding = -rows % int(panel)
    padded = F.pad(elements, (0, -columns % per_word, 0, padding))
    words = padded.view(experts, -1, int(panel), padded.shape[-1] // per_word, per_word).permute(0, 1, 3, 2, 4)
    per_channel = F.pad(scales, (0, padding)), padded.sum(-1, dtype=torch.int32)
    parts = [part.contiguous().flatten().view(torch.uint8) for part in (words, *per_channel, inputs)]
    return packed._replace(block=torch.cat(parts), layout=layout)
