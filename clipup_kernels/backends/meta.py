"""Shapes and types of every op's outputs, for meta tensors, ``torch.compile`` and export.

The outputs are uninitialized: the C++ backends fill some of them.
"""

from __future__ import annotations

import torch

from .. import glu
from ..types import RoutingBlocks


def router_logits(x, weight, mask=None):
    return weight.new_empty(x.shape[0], weight.shape[0])


def router_logits_backward(d_logits, x, weight, mask, output_mask):
    return (
        x.new_empty(x.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape if output_mask[1] else (0,)),
    )


def topk_gating(logits, k, renormalize, selection_bias=None, mask=None):
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, k),
        logits.new_empty(num_tokens, k, dtype=torch.int32),
        logits.new_empty(num_tokens),
        logits.new_empty(num_experts),
        logits.new_empty(()),
        logits.new_empty(k, num_experts, dtype=torch.int32),
    )


def topk_gating_backward(logits, *args):
    return logits.new_empty(logits.shape)


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None):
    return (
        expert_indices.new_empty(num_experts + 1),
        expert_indices.new_empty(expert_indices.shape[0] * expert_indices.shape[1]),
        expert_indices.new_empty(expert_indices.shape),
    )


def permute(x, offsets, choice_of_row, row_of_choice):
    return x.new_empty(choice_of_row.shape[0], x.shape[1])


def gather_sum(rows, row_of_choice):
    return rows.new_empty(row_of_choice.shape[0], rows.shape[1])


def grouped_linear(rows, weight, bias, offsets):
    return rows.new_empty(rows.shape[0], weight.shape[1])


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask):
    return (
        rows.new_empty(rows.shape if output_mask[0] else 0),
        rows.new_empty(weight.shape if output_mask[1] else 0),
        rows.new_empty(weight.shape[:2] if output_mask[2] else 0),
    )


def combine(rows, gates, offsets, choice_of_row, row_of_choice):
    return rows.new_empty(gates.shape[0], rows.shape[1])


def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice):
    return rows.new_empty(rows.shape), gates.new_empty(gates.shape)


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
):  # fmt: skip
    pre_activation = (choice_of_row.shape[0], in_weight.shape[1])
    if gate_weight is not None:
        pre_activation = (2, *pre_activation)
    return x.new_empty(x.shape), x.new_empty(pre_activation if keep_z else 0)


def dense_mlp(x, *args):
    return x.new_empty(x.shape)


packed_expert_mlp = packed_dense_mlp = dense_mlp


def self_attention(qkv, mask, heads, quantize):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def packed_sparse_mlp(x, router_weight, selection_bias, mask, k, *args):
    sizes = RoutingBlocks.sizes(x.shape[0], router_weight.shape[0], k)
    floats, ints = map(sum, sizes)
    return x.new_empty(x.shape), router_weight.new_empty(floats), router_weight.new_empty(ints, dtype=torch.int32)


def packed_grouped_linear(rows, packed, bias, offsets, out_features, layout):
    return rows.new_empty(rows.shape[0], out_features)


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
):  # fmt: skip
    need_x, need_gates, need_in, need_out = output_mask
    arguments = (x, gates, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    needs = (need_x, need_gates, need_in, need_in, need_out, need_out, need_in, need_in)
    return tuple(
        x.new_empty(0) if argument is None else argument.new_empty(argument.shape if needed else 0)
        for argument, needed in zip(arguments, needs, strict=True)
    )


expert_glu_forward, expert_glu_backward = glu.forward_of(expert_mlp_forward), glu.backward_of(expert_mlp_backward)
