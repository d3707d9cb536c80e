"""Weights packed once for inference on CPUs. The caller holds them; this package caches none.

A product reads its right operand as B panels (csrc/cpu/kernels.h). From a plain weight the kernels pack them at every
call; a packed weight already has them. The results are bitwise the same unless it is quantized.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    block = _lasting(num_bytes)
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
    elements = _elements(packed)
    if packed.quantization is not None:
        parts = quantized_parts(packed)
        elements = parts.elements * parts.scales[..., None] * parts.inputs[..., :1, :]
    return elements.to(packed.dtype).reshape(packed.shape).clone()


class QuantizedParts(NamedTuple):
    """What a weight in int8 consists of, in any layout: with x quantized as ``x * inputs[0] + inputs[1]``, the weight
    stands for ``elements * scales[:, None] * inputs[0]``."""

    elements: Tensor
    """[E, O, I] or [O, I] int8."""
    scales: Tensor
    """[E, O] or [O] float32, of the output channels."""
    inputs: Tensor
    """[E, 2, I] or [2, I] float32: scales and shifts of the inputs."""


def quantized_parts(packed: PackedWeight) -> QuantizedParts:
    """The parts of a quantized weight, independent of the CPU that it was packed for."""
    experts, rows, columns = (1, *packed.shape)[-3:]
    channels = _padded(rows, int(packed.layout.rsplit("x", 1)[1]))
    stride = _padded(columns, _INPUT_PADDING)
    scales, _, inputs = packed.block[experts * channels * _padded(columns, 4) :].split(
        [4 * experts * channels, 4 * experts * channels, 8 * experts * stride]
    )
    return QuantizedParts(
        _elements(packed).reshape(packed.shape),
        scales.view(torch.float32).view(experts, channels)[:, :rows].reshape(packed.shape[:-1]),
        inputs.view(torch.float32).view(*packed.shape[:-2], 2, stride)[..., :columns],
    )


def pack_parts(parts: QuantizedParts, dtype: torch.dtype) -> PackedWeight:
    """The weight of these parts in the layout of this CPU's kernels.

    Args:
        dtype: of x.

    Raises:
        RuntimeError: no kernel here multiplies quantized weights.
    """
    layout, shape = packed_layout(dtype, "int8"), tuple(parts.elements.shape)
    experts, rows, columns = (1, *shape)[-3:]
    panel = int(layout.rsplit("x", 1)[1])
    padding = _padded(rows, panel) - rows
    padded = F.pad(parts.elements, (0, -columns % 4, 0, padding))
    words = padded.view(torch.int32).view(experts, -1, panel, padded.shape[-1] // 4).transpose(2, 3)
    scales, shifts = parts.inputs.unbind(-2)
    beside = (0, -columns % _INPUT_PADDING)
    inputs = torch.stack([F.pad(scales, beside, value=1.0), F.pad(shifts, beside)], -2)
    per_channel = F.pad(parts.scales, (0, padding)), padded.sum(-1, dtype=torch.int32)
    pieces = [piece.contiguous().flatten().view(torch.uint8) for piece in (words, *per_channel, inputs)]
    block = _lasting(sum(piece.numel() for piece in pieces))
    return PackedWeight(torch.cat(pieces, out=block), shape, dtype, layout)


_INPUT_PADDING = 32
"""Scales and shifts of an expert's inputs are padded to a multiple of this (csrc/cpu/kernels.h)."""
_WORDS = {"float32": (torch.float32, 1), "bfloat16x2": (torch.bfloat16, 2), "int8x4": (torch.int8, 4)}


def _padded(size: int, multiple: int) -> int:
    return size + -size % multiple


def _lasting(num_bytes: int) -> Tensor:
    """Memory for a packed weight, in huge pages."""
    return torch.frombuffer(extension.NATIVE.Block(max(num_bytes, 1), lasting=True), dtype=torch.uint8)


def _elements(packed: PackedWeight) -> Tensor:
    """The elements as they are stored, [E, O, I]."""
    word, panel = packed.layout.rsplit("x", 1)
    stored, per_word = _WORDS[word]
    experts, rows, columns = (1, *packed.shape)[-3:]
    channels = _padded(rows, int(panel))
    words = packed.block[: 4 * experts * channels * -(-columns // per_word)].view(stored)
    words = words.view(experts, channels // int(panel), -1, int(panel), per_word)
    return words.permute(0, 1, 3, 2, 4).reshape(experts, channels, -1)[:, :rows, :columns]


def _repack(packed: PackedWeight) -> PackedWeight:
    """A packed weight in the layout of this CPU's kernels, with the same values."""
    if packed.quantization is None or 0 in packed.shape:
        return pack_weight(unpack_weight(packed), packed.quantization)
    return pack_parts(quantized_parts(packed), packed.dtype)
