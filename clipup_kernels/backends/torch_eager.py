"""Every op in plain torch, on any device and in any type: routing as in ``reference``, experts on the grouped products
of ``grouped_products``, and formulas for backward.

It computes where no other backend does (float64, a device without kernels, no extension) and where it is asked for.
Except for checks of indices on the CPU nothing depends on values, so the host never waits. Products have the type
of the tokens; gates, and sums over rows and choices, are at least float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, glu, reference
from ..types import Plan
from .grouped_products import outer, project, sums  # noqa: F401  parts of the functions below
from .plan_checks import check_choices, check_offsets, check_rows

Outputs = tuple[Tensor, ...]
_PARTS = sys.modules[__name__]
"""Where products and moves of rows come from: a module with ``project``, ``outer``, ``sums``, ``permute``, ``combine``
and ``gather_sum``."""
_ROWS_IN_CACHE = 128


def wide(*tensors: Tensor | None) -> list[Any]:
    """The tensors in at least float32."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


def router_logits(x, weight, mask=None) -> Tensor:
    return reference.router_logits(x, weight, mask)


def router_logits_backward(d_logits, x, weight, mask, output_mask) -> Outputs:
    if mask is not None:
        d_logits, x = torch.where(mask[:, None], d_logits, 0), torch.where(mask[:, None], x, 0)
    return (
        (d_logits @ weight).to(x.dtype) if output_mask[0] else x.new_empty(0),
        d_logits.mT @ x.to(weight.dtype) if output_mask[1] else weight.new_empty(0),
    )


def topk_gating(logits, k, renormalize, selection_bias=None, mask=None) -> Outputs:
    return tuple(reference.topk_gating(logits.contiguous(), k, renormalize, selection_bias, mask))


def topk_gating_backward(
    logits, expert_indices, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    if mask is None:
        mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
    logits = torch.where(mask[:, None], logits, 0)
    probs = logits.softmax(-1)
    share = (mask.to(probs.dtype) / mask.sum().clamp_min(1))[:, None]
    chosen = expert_indices.long().clamp_min(0)
    d_probs, d_chosen = torch.zeros_like(probs), torch.zeros_like(probs)
    if d_gates is not None:
        if renormalize:
            gates = reference.renormalize_gates(probs.gather(1, chosen), logits.gather(1, chosen))
            d_chosen.scatter_add_(1, chosen, gates * (d_gates - (d_gates * gates).sum(-1, keepdim=True)))
        else:
            d_probs.scatter_add_(1, chosen, d_gates)
    if d_top_prob is not None:
        d_probs.scatter_add_(1, probs.argmax(-1, keepdim=True), d_top_prob[:, None])
    if d_mean_probs is not None:
        d_probs += share * d_mean_probs
    d_logits = d_chosen + probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True))
    if d_z_loss is not None:
        d_logits += share * (2 * d_z_loss) * logits.logsumexp(-1, keepdim=True) * probs
    return torch.where(mask[:, None], d_logits, 0)


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None) -> Outputs:
    checks.row_count(*expert_indices.shape)
    if expert_indices.device.type == "cpu":  # on other devices the check would make the host wait
        wrong = expert_indices[(expert_indices < -1) | (expert_indices >= num_experts)]
        if len(wrong):
            raise ValueError(f"expert_indices: expected values from -1 to {num_experts - 1}, got {int(wrong[0])}")
    return tuple(reference.dispatch(expert_indices, num_experts, capacity_factor, priority, mask))


def permute(x, offsets, choice_of_row, row_of_choice) -> Tensor:
    check_choices(choice_of_row, offsets)
    return reference.permute(x, Plan(offsets, choice_of_row, row_of_choice))


def gather_sum(rows, row_of_choice) -> Tensor:
    """[T, D]: the sum of every token's rows; the backward of ``permute``."""
    check_rows(row_of_choice, len(rows))
    (summed,) = wide(rows)
    ones = torch.ones_like(row_of_choice, dtype=summed.dtype)
    plan = Plan(row_of_choice, row_of_choice, row_of_choice)  # combine reads the last field alone
    return reference.combine(summed, ones, plan).to(rows.dtype)


def grouped_linear(rows, weight, bias, offsets, parts=_PARTS) -> Tensor:
    check_offsets(offsets, len(rows))
    return parts.project(rows, weight, bias, offsets)


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask, parts=_PARTS) -> Outputs:
    need_rows, need_weight, need_bias = output_mask
    check_offsets(offsets, len(rows))
    return (
        parts.project(d_out, weight.mT, None, offsets) if need_rows else rows.new_empty(0),
        parts.outer(d_out, rows, offsets).to(rows.dtype) if need_weight else rows.new_empty(0),
        parts.sums(d_out, offsets).to(rows.dtype) if need_bias else rows.new_empty(0),
    )


def combine(rows, gates, offsets, choice_of_row, row_of_choice) -> Tensor:
    check_rows(row_of_choice, len(rows))
    wide_rows, wide_gates = wide(rows, gates)
    plan = Plan(offsets, choice_of_row, row_of_choice)
    return reference.combine(wide_rows, wide_gates, plan).to(rows.dtype)


def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice) -> Outputs:
    check_choices(choice_of_row, offsets)
    check_rows(row_of_choice, len(rows))
    plan = Plan(offsets, choice_of_row, row_of_choice)
    wide_dy, wide_rows, wide_gates = wide(dy, rows, gates)
    d_rows = reference.permute(wide_dy, plan) * gate_of_row(wide_gates, choice_of_row)[:, None]
    filled = (choice_of_row >= 0)[:, None]
    d_gate_of_row = (torch.where(filled, wide_rows, 0) * reference.permute(wide_dy, plan)).sum(-1)
    return d_rows.to(rows.dtype), per_choice(d_gate_of_row, row_of_choice).to(gates.dtype)


def gate_of_row(gates: Tensor, choice_of_row: Tensor) -> Tensor:
    """[R]: the gate of each row's pair, 0 in empty rows."""
    return torch.where(choice_of_row >= 0, gates.flatten()[choice_of_row.clamp_min(0)], 0)


def per_choice(values: Tensor, row_of_choice: Tensor) -> Tensor:
    """[T, K]: a value per row ([R]) gathered by pair, 0 for pairs without a row."""
    return torch.where(row_of_choice >= 0, values[row_of_choice.clamp_min(0)], 0)


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """``grad * activation'(z)``."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    if activation == "quick_gelu":
        wide = reference.at_least_float32(z)
        gate = torch.sigmoid(1.702 * wide)
        return grad * (gate + 1.702 * wide * gate * (1 - gate)).to(z.dtype)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    assert activation == "relu", activation
    return torch.where(z > 0, grad, 0)


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z, parts=_PARTS,
) -> Outputs:  # fmt: skip
    rows = parts.permute(x, offsets, choice_of_row, row_of_choice)
    z = expert_mlp_z(rows, offsets, in_weight, in_bias, gate_weight, gate_bias, parts)
    out = parts.project(activate_z(z, activation), out_weight, out_bias, offsets)
    return parts.combine(out, gates, offsets, choice_of_row, row_of_choice), z if keep_z else x.new_empty(0)


def activate_z(z: Tensor, activation: str) -> Tensor:
    """a [R, H] from z [R, H], or from the gated [2, R, H] (in-projection first, gate second)."""
    return reference.activate(z, activation) if z.dim() == 2 else reference.activate(z[1], activation) * z[0]


def activate_z_backward(da: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz of z's shape from da [R, H]."""
    if z.dim() == 2:
        return activation_backward(da, z, activation)
    return torch.stack([da * reference.activate(z[1], activation), activation_backward(da * z[0], z[1], activation)])


def by_rows(compute: Callable[..., Outputs], *tensors: Tensor) -> Outputs:
    """``compute(*tensors)``, in which rows (dimension -2) do not depend on each other; on a CPU, block by block.

    Blocks stay in a cache: 20 % less time for a layer's training step in bfloat16 on a Xeon with AMX.
    """
    num_rows = tensors[0].shape[-2]
    if not tensors[0].is_cpu or num_rows <= _ROWS_IN_CACHE:
        return compute(*tensors)
    results: Outputs = ()
    for start in range(0, num_rows, _ROWS_IN_CACHE):
        block = compute(*(t[..., start : start + _ROWS_IN_CACHE, :] for t in tensors))
        results = results or tuple(t.new_empty(*t.shape[:-2], num_rows, t.shape[-1]) for t in block)
        for result, part in zip(results, block, strict=True):
            result[..., start : start + _ROWS_IN_CACHE, :] = part
    return results


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask, parts=_PARTS,
) -> Outputs:  # fmt: skip
    need_x, need_gates, need_in, need_out = output_mask
    check_rows(row_of_choice, len(choice_of_row))
    rows = parts.permute(x, offsets, choice_of_row, row_of_choice)
    if z.numel() == 0:
        z = expert_mlp_z(rows, offsets, in_weight, in_bias, gate_weight, gate_bias, parts)
    d_row = parts.permute(dy, offsets, choice_of_row, row_of_choice)
    gate = gate_of_row(gates, choice_of_row)[:, None]
    owner = reference.expert_of_row(offsets, len(rows)).clamp_max(len(in_weight) - 1)[:, None]

    def of_rows(z, da, d_row, gate, owner) -> Outputs:
        a = activate_z(z, activation)
        wide_a, wide_da, wide_row, wide_bias = wide(a, da, d_row, out_bias)
        d_gate = (wide_a * wide_da).sum(-1, keepdim=True)
        if wide_bias is not None:
            d_gate = d_gate + (wide_row * wide_bias[owner[:, 0]]).sum(-1, keepdim=True)
        d_a, scaled = (gate * wide_da).to(x.dtype), (gate * wide_row).to(x.dtype)
        return a, activate_z_backward(d_a, z, activation), scaled, d_gate

    da = parts.project(d_row, out_weight.mT, None, offsets)
    a, dz, scaled, d_gate = by_rows(of_rows, z, da, d_row, gate, owner)
    dz_in, dz_gate = (dz, dz) if gate_weight is None else dz.unbind()  # dz_gate is read of gated experts alone

    def dx() -> Tensor:
        d_rows = parts.project(dz_in, in_weight.mT, None, offsets)
        if gate_weight is not None:
            d_rows = d_rows + parts.project(dz_gate, gate_weight.mT, None, offsets)
        return parts.gather_sum(d_rows, row_of_choice)

    def result(wanted: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute().to(x.dtype) if wanted else x.new_empty(0)

    return (
        result(need_x, dx),
        per_choice(d_gate[:, 0], row_of_choice).to(gates.dtype) if need_gates else gates.new_empty(0),
        result(need_in, lambda: parts.outer(dz_in, rows, offsets)),
        result(need_in and in_bias is not None, lambda: parts.sums(dz_in, offsets)),
        result(need_out, lambda: parts.outer(scaled, a, offsets)),
        result(need_out and out_bias is not None, lambda: parts.sums(scaled, offsets)),
        result(need_in and gate_weight is not None, lambda: parts.outer(dz_gate, rows, offsets)),
        result(need_in and gate_bias is not None, lambda: parts.sums(dz_gate, offsets)),
    )


def expert_mlp_z(rows, offsets, in_weight, in_bias, gate_weight, gate_bias, parts) -> Tensor:
    """z [R, H], or [2, R, H] for gated experts, from permuted rows."""
    z = parts.project(rows, in_weight, in_bias, offsets)
    if gate_weight is None:
        return z
    return torch.stack([z, parts.project(rows, gate_weight, gate_bias, offsets)])


def dense_mlp(x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias, activation) -> Tensor:
    z = F.linear(x, in_weight, in_bias)
    if gate_weight is None:
        a = reference.activate(z, activation)
    else:
        a = reference.activate(F.linear(x, gate_weight, gate_bias), activation) * z
    return F.linear(a, out_weight, out_bias)


def self_attention(qkv, mask, heads, quantize) -> Tensor:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    mask = None if mask is None else mask.to(qkv.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # with the strides of q
    return y.transpose(1, 2).reshape(batch, length, width // 3).contiguous()


expert_glu_forward, expert_glu_backward = glu.forward_of(expert_mlp_forward), glu.backward_of(expert_mlp_backward)
