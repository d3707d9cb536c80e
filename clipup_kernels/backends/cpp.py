"""Calls into the compiled extension: allocates outputs, and passes arguments as addresses and sizes, and structs as
tuples of their members (csrc/moe.h).

Every function has the arguments of its op, on CPU tensors of float32, bfloat16 or float16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, glu
from ..types import ACTIVATIONS, RoutingBlocks
from . import meta
from .extension import NATIVE
from .plan_checks import check_offsets

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


PACKED_TYPE = {None: 0, "int8": 1}
"""csrc/moe.h's PackedType, by ``quantize`` of ``pack_weight``."""


def packed_layout(dtype: torch.dtype, quantize: str | None = None) -> str:
    """How the forward pass reads a weight (``PackedWeight.layout``)."""
    panel, per_word = NATIVE.packed_layout(DTYPE_CODE[dtype], PACKED_TYPE[quantize])
    word = {1: "float32", 2: "bfloat16x2", 4: "int8x4"}[per_word]
    return f"{word}x{panel}"


_SOME_MEMORY = torch.empty(64, dtype=torch.uint8)


def address(tensor: Tensor | None) -> int:
    """0 for None. An empty tensor, such as a gate's weight with D = 0, has no memory and gets an address all the
    same."""
    if tensor is None:
        return 0
    checks.memory(tensor)
    return tensor.data_ptr() or _SOME_MEMORY.data_ptr()


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _pooled(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """An uninitialized tensor over memory that returns to the extension's pool, for large outputs of every step, above
    all gradients of weights: fresh memory costs page faults."""
    count = math.prod(shape)
    if count * like.element_size() < 1 << 20:
        return like.new_empty(shape)
    return torch.frombuffer(NATIVE.Block(count * like.element_size()), dtype=like.dtype).view(shape)


def _end_address(offsets: Tensor) -> int:
    """Address of offsets[E], the number of rows in use."""
    return offsets.data_ptr() + (offsets.numel() - 1) * offsets.element_size()


def router_logits(x, weight, mask=None) -> Tensor:
    x, weight, mask = _dense(x, weight, mask)
    logits = weight.new_empty(x.shape[0], weight.shape[0])
    NATIVE.router_logits(
        address(x), DTYPE_CODE[x.dtype], address(mask), address(weight), *x.shape, weight.shape[0], address(logits)
    )
    return logits


def router_logits_backward(d_logits, x, weight, mask, output_mask) -> tuple[Tensor, Tensor]:
    d_logits, x, weight, mask = _dense(d_logits, x, weight, mask)
    d_x, d_weight = meta.router_logits_backward(d_logits, x, weight, mask, output_mask)
    NATIVE.router_logits_backward(
        address(d_logits), address(x), DTYPE_CODE[x.dtype], address(mask), address(weight), *x.shape,
        weight.shape[0], address(d_x if output_mask[0] else None), address(d_weight if output_mask[1] else None),
    )  # fmt: skip
    return d_x, d_weight


def topk_gating(logits, k, renormalize, selection_bias=None, mask=None) -> tuple[Tensor, ...]:
    logits, selection_bias, mask = _dense(logits, selection_bias, mask)
    num_tokens, num_experts = logits.shape
    outputs = meta.topk_gating(logits, k, renormalize)
    NATIVE.topk_gating(
        address(logits), address(mask), address(selection_bias), num_tokens, num_experts, k, renormalize,
        *map(address, outputs),
    )  # fmt: skip
    return outputs


def topk_gating_backward(
    logits, expert_indices, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    logits, expert_indices, mask = _dense(logits, expert_indices, mask)
    grads = _dense(d_gates, d_top_prob, d_mean_probs, d_z_loss)
    d_logits = torch.empty_like(logits)
    NATIVE.topk_gating_backward(
        address(logits), address(mask), address(expert_indices), *logits.shape, expert_indices.shape[1], renormalize,
        *map(address, grads), address(d_logits),
    )  # fmt: skip
    return d_logits


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    expert_indices, priority, mask = _dense(expert_indices, priority, mask)
    outputs = meta.dispatch(expert_indices, num_experts)
    NATIVE.dispatch(
        address(expert_indices), address(mask), address(priority), *expert_indices.shape, num_experts,
        -1.0 if capacity_factor is None else capacity_factor, *map(address, outputs),
    )  # fmt: skip
    return outputs


def permute(x, offsets, choice_of_row, row_of_choice) -> Tensor:
    check_offsets(offsets, choice_of_row.numel())
    x, offsets, choice_of_row = _dense(x, offsets, choice_of_row)
    width, num_rows = x.shape[1], choice_of_row.numel()
    rows = x.new_empty(num_rows, width)
    NATIVE.permute(
        address(x), width * x.element_size(), address(choice_of_row), _end_address(offsets), num_rows,
        row_of_choice.shape[1], address(rows),
    )  # fmt: skip
    return rows


def gather_sum(rows, row_of_choice) -> Tensor:
    return _gather_sum(rows, None, row_of_choice)


def combine(rows, gates, offsets, choice_of_row, row_of_choice) -> Tensor:
    return _gather_sum(rows, gates, row_of_choice)


def _gather_sum(rows: Tensor, gates: Tensor | None, row_of_choice: Tensor) -> Tensor:
    rows, gates, row_of_choice = _dense(rows, gates, row_of_choice)
    num_tokens, k = row_of_choice.shape
    y = rows.new_empty(num_tokens, rows.shape[1])
    NATIVE.gather_sum(
        address(rows), DTYPE_CODE[rows.dtype], address(row_of_choice), address(gates), num_tokens, k,
        rows.shape[1], address(y),
    )  # fmt: skip
    return y


def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice) -> tuple[Tensor, Tensor]:
    check_offsets(offsets, len(rows))
    dy, rows, gates, offsets, row_of_choice = _dense(dy, rows, gates, offsets, row_of_choice)
    d_rows, d_gates = torch.empty_like(rows), torch.empty_like(gates)
    NATIVE.combine_backward(
        address(dy), address(rows), DTYPE_CODE[rows.dtype], address(gates), address(row_of_choice),
        *row_of_choice.shape, rows.shape[1], _end_address(offsets), rows.shape[0], address(d_rows),
        address(d_gates),
    )  # fmt: skip
    return d_rows, d_gates


def grouped_linear(rows, weight, bias, offsets) -> Tensor:
    (weight,) = _dense(weight)
    return _grouped_linear(rows, weight.shape, address(weight), 0, bias, offsets)


def packed_grouped_linear(rows, packed, bias, offsets, out_features, quantize) -> Tensor:
    shape = (offsets.numel() - 1, out_features, rows.shape[1])
    _check_blocks(rows, shape, quantize, packed)
    return _grouped_linear(rows, shape, 0, address(packed), bias, offsets, quantize)


def _grouped_linear(
    rows: Tensor, shape, weight: int, packed: int, bias: Tensor | None, offsets: Tensor, quantize: str | None = None
) -> Tensor:
    """``weight`` or ``packed`` is the address of a weight of ``shape`` [E, O, I], the other 0."""
    rows, bias, offsets = _dense(rows, bias, offsets)
    out = rows.new_empty(rows.shape[0], shape[1])
    NATIVE.grouped_linear(
        DTYPE_CODE[rows.dtype], address(rows), weight, address(bias), address(offsets), rows.shape[0], *shape,
        address(out), packed, PACKED_TYPE[quantize],
    )  # fmt: skip
    return out


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask) -> tuple[Tensor, ...]:
    d_out, rows, weight, offsets = _dense(d_out, rows, weight, offsets)
    shapes = (rows.shape, weight.shape, weight.shape[:2])
    grads = [_pooled(rows, shape if wanted else (0,)) for shape, wanted in zip(shapes, output_mask, strict=True)]
    NATIVE.grouped_linear_backward(
        DTYPE_CODE[rows.dtype], *map(address, (d_out, rows, weight, offsets)), rows.shape[0], *weight.shape,
        *(address(grad if wanted else None) for grad, wanted in zip(grads, output_mask, strict=True)),
    )  # fmt: skip
    return tuple(grads)


def _plain_experts(x: Tensor, activation: str, weights: Sequence[Tensor | None]) -> tuple[int, ...]:
    """moe.h's Experts, from [E, H, D] or [H, D] ``in_weight``, ``in_bias``, ``out_weight`` and so on."""
    in_weight = weights[0]
    num_experts, hidden, width = (1, *in_weight.shape)[-3:]
    stride = 0 if in_weight.is_contiguous() else in_weight.stride(0)
    return (
        *(DTYPE_CODE[x.dtype], ACTIVATIONS.index(activation), num_experts, width, hidden),
        *(*map(address, weights), 0, 0, 0, stride, PACKED_TYPE[None]),
    )


def _packed_experts(
    x: Tensor, activation: str, num_experts: int, hidden: int, quantize: str | None, biases: list[Tensor | None],
    in_packed: Tensor, out_packed: Tensor, gate_packed: Tensor | None,
) -> tuple[int, ...]:  # fmt: skip
    """The same without plain weights. Refuses packed weights that are shorter than what is read."""
    width = x.shape[1]
    _check_blocks(x, (num_experts, hidden, width), quantize, in_packed, gate_packed)
    _check_blocks(x, (num_experts, width, hidden), quantize, out_packed)
    in_bias, out_bias, gate_bias = map(address, biases)
    return (
        *(DTYPE_CODE[x.dtype], ACTIVATIONS.index(activation), num_experts, width, hidden),
        *(0, in_bias, 0, out_bias, 0, gate_bias, *map(address, (in_packed, out_packed, gate_packed))),
        *(0, PACKED_TYPE[quantize]),
    )


def _routing(gates: Tensor, offsets: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> tuple[int, ...]:
    """moe.h's Routing."""
    return (*row_of_choice.shape, *map(address, (gates, offsets, choice_of_row, row_of_choice)))


def _in_place(in_weight: Tensor, gate_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as the native calls read them: without a copy if both are contiguous, or the halves of one matrix."""
    _, hidden, width = in_weight.shape
    halves = (2 * hidden * width, width, 1)  # of a matrix [E, 2H, D]
    if gate_weight is not None and hidden * width and in_weight.stride() == gate_weight.stride() == halves:
        return in_weight, gate_weight
    return in_weight.contiguous(), None if gate_weight is None else gate_weight.contiguous()


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    in_weight, gate_weight = _in_place(in_weight, gate_weight)
    x, gates, in_bias, out_weight, out_bias, gate_bias = _dense(x, gates, in_bias, out_weight, out_bias, gate_bias)
    weights = in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias
    routing = _dense(offsets, choice_of_row, row_of_choice)
    pre_activation: tuple[int, ...] = (choice_of_row.numel(), in_weight.shape[1])
    if gate_weight is not None:
        pre_activation = (2, *pre_activation)
    y, z = torch.empty_like(x), _pooled(x, pre_activation if keep_z else (0,))
    NATIVE.expert_mlp_forward(
        _plain_experts(x, activation, weights), _routing(gates, *routing), address(x), address(y),
        address(z if keep_z else None),
    )  # fmt: skip
    return y, z


def packed_expert_mlp(
    x, gates, offsets, choice_of_row, row_of_choice, in_packed, in_bias, out_packed, out_bias, gate_packed, gate_bias,
    hidden, activation, quantize,
) -> Tensor:  # fmt: skip
    x, gates, *biases = _dense(x, gates, in_bias, out_bias, gate_bias)
    routing = _dense(offsets, choice_of_row, row_of_choice)
    experts = _packed_experts(
        x, activation, offsets.numel() - 1, hidden, quantize, biases, in_packed, out_packed, gate_packed
    )
    y = torch.empty_like(x)
    NATIVE.expert_mlp_forward(experts, _routing(gates, *routing), address(x), address(y), 0)
    return y


def packed_sparse_mlp(
    x, router_weight, selection_bias, mask, k, renormalize, capacity_factor, by_priority, gate_scale, in_packed,
    in_bias, out_packed, out_bias, gate_packed, gate_bias, hidden, activation, quantize,
) -> tuple[Tensor, ...]:  # fmt: skip
    x, router_weight, selection_bias, mask, *biases = _dense(
        x, router_weight, selection_bias, mask, in_bias, out_bias, gate_bias
    )
    num_experts = router_weight.shape[0]
    experts = _packed_experts(x, activation, num_experts, hidden, quantize, biases, in_packed, out_packed, gate_packed)
    sizes = RoutingBlocks.sizes(x.shape[0], num_experts, k)
    floats, ints = router_weight.new_empty(sum(sizes[0])), x.new_empty(sum(sizes[1]), dtype=torch.int32)
    y = torch.empty_like(x)
    router = (
        *(address(router_weight), address(selection_bias), k, renormalize),
        *(-1.0 if capacity_factor is None else capacity_factor, by_priority, gate_scale),
    )
    NATIVE.sparse_mlp_forward(
        experts, router, address(mask), x.shape[0], address(x), address(y), address(floats), address(ints)
    )
    return y, floats, ints


def _check_blocks(x: Tensor, shape: tuple[int, int, int], quantize: str | None, *blocks: Tensor | None) -> None:
    """Refuses packed weights that are shorter than what is read."""
    bytes_read = _packed_bytes(x.dtype, shape, quantize)
    for block in blocks:
        if block is None:
            continue
        if block.dtype != torch.uint8 or block.numel() < bytes_read or not block.is_contiguous():
            raise ValueError(
                f"a packed weight of shape {list(shape)} takes {bytes_read} bytes, got {block.numel()} of "
                f"{block.dtype}{'' if block.is_contiguous() else ', not contiguous'}; use what pack_weight() returned"
            )


@functools.lru_cache(1024)
def _packed_bytes(dtype: torch.dtype, shape: tuple[int, int, int], quantize: str | None) -> int:
    return NATIVE.packed_weight_bytes(DTYPE_CODE[dtype], *shape, PACKED_TYPE[quantize])


def dense_mlp(x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias, activation) -> Tensor:
    weights = _dense(in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    return _dense_mlp(x, _plain_experts(x, activation, weights))


def packed_dense_mlp(
    x, in_packed, in_bias, out_packed, out_bias, gate_packed, gate_bias, hidden, activation, quantize
) -> Tensor:
    biases = _dense(in_bias, out_bias, gate_bias)
    return _dense_mlp(
        x, _packed_experts(x, activation, 1, hidden, quantize, biases, in_packed, out_packed, gate_packed)
    )


def _dense_mlp(x: Tensor, experts: tuple[int, ...]) -> Tensor:
    (x,) = _dense(x)
    offsets = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    y = torch.empty_like(x)
    NATIVE.expert_mlp_forward(experts, (x.shape[0], 1, 0, address(offsets), 0, 0), address(x), address(y), 0)
    return y


def self_attention(qkv, mask, heads, quantize) -> Tensor:
    qkv, mask = _dense(qkv, mask)
    if qkv.dtype == torch.bfloat16 and NATIVE.instruction_tier() == "amx":
        quantize = None  # products of bfloat16 in tiles take less time than quantizing for int8
    out, (batch, length, width) = meta.self_attention(qkv, mask, heads, quantize), qkv.shape
    sizes = () if mask is None else zip(mask.shape[:2], mask.stride(), strict=False)
    strides = [0 if size == 1 else stride for size, stride in sizes] or (0, 0)
    NATIVE.self_attention(
        DTYPE_CODE[qkv.dtype], address(qkv), address(mask), *strides, batch, length, heads, width // 3 // heads,
        address(out), PACKED_TYPE[quantize],
    )  # fmt: skip
    return out


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_gates, need_in, need_out = output_mask
    dy, x, gates, *weights = _dense(dy, x, gates, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    routing = _dense(offsets, choice_of_row, row_of_choice)
    (z,) = _dense(z)
    wanted = (need_x, need_gates, need_in, need_in, need_out, need_out, need_in, need_in)
    grads = [
        _pooled(t, t.shape) if need and t is not None else None
        for t, need in zip((x, gates, *weights), wanted, strict=True)
    ]
    recompute = z.numel() == 0
    NATIVE.expert_mlp_backward(
        _plain_experts(x, activation, weights), _routing(gates, *routing), address(dy), address(x),
        address(None if recompute else z), (*map(address, grads),),
    )  # fmt: skip
    empty = (x, gates, *[x] * 6)
    return tuple(like.new_empty(0) if grad is None else grad for grad, like in zip(grads, empty, strict=True))


expert_glu_forward = glu.forward_of(expert_mlp_forward)


def expert_glu_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, gate_in_weight, out_weight, z, activation, output_mask
) -> tuple[Tensor, ...]:
    """Reads both halves in place and writes their gradients as halves."""
    dy, x, gates, both, out_weight, z = _dense(dy, x, gates, gate_in_weight, out_weight, z)
    routing = _dense(offsets, choice_of_row, row_of_choice)
    hidden = out_weight.shape[2]
    tensors = (x, gates, both, out_weight)
    d_x, d_gates, d_both, d_out = grads = [
        _pooled(like, like.shape if wanted else (0,)) for like, wanted in zip(tensors, output_mask, strict=True)
    ]
    d_gate, d_in = (d_both[:, :hidden], d_both[:, hidden:]) if output_mask[2] else (None, None)
    wanted_x, wanted_gates, _, wanted_out = output_mask
    weights = both[:, hidden:], None, out_weight, None, both[:, :hidden], None
    NATIVE.expert_mlp_backward(
        _plain_experts(x, activation, weights), _routing(gates, *routing), address(dy), address(x),
        address(z if z.numel() else None),
        (
            address(d_x if wanted_x else None), address(d_gates if wanted_gates else None), address(d_in), 0,
            address(d_out if wanted_out else None), 0, address(d_gate), 0,
        ),
    )  # fmt: skip
    return tuple(grads)
