"""Every op in plain torch, on any device and in any type: the forward of ``reference``, and formulas for backward.

The fallback where no other backend runs (float64, a device without kernels, no extension). It favors correctness: every
expert runs on every row. Except for a check in ``dispatch`` on the CPU nothing depends on values, so the host never
waits. 16-bit types are widened: sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..types import Plan

Outputs = tuple[Tensor, ...]


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
    return tuple(reference.topk_gating(logits, k, renormalize, selection_bias, mask))


def topk_gating_backward(
    logits, expert_indices, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    if mask is None:
        mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
    logits = torch.where(mask[:, None], logits, 0)
    probs = logits.softmax(-1)
    share = (mask.to(probs.dtype) / mask.sum().clamp_min(1))[:, None]
    chosen = expert_indices.long().clamp_min(0)
    d_probs = torch.zeros_like(probs)
    if d_gates is not None:
        if renormalize:
            gates = probs.gather(1, chosen)
            total = gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
            d_gates = (d_gates - (d_gates * gates).sum(-1, keepdim=True) / total) / total
        d_probs.scatter_add_(1, chosen, d_gates)
    if d_top_prob is not None:
        d_probs.scatter_add_(1, probs.argmax(-1, keepdim=True), d_top_prob[:, None])
    if d_mean_probs is not None:
        d_probs += share * d_mean_probs
    d_logits = probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True))
    if d_z_loss is not None:
        d_logits += share * (2 * d_z_loss) * logits.logsumexp(-1, keepdim=True) * probs
    return torch.where(mask[:, None], d_logits, 0)


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None) -> Outputs:
    if expert_indices.device.type == "cpu":  # on other devices the check would make the host wait
        wrong = expert_indices[(expert_indices < -1) | (expert_indices >= num_experts)]
        if len(wrong):
            raise ValueError(f"expert_indices: expected values from -1 to {num_experts - 1}, got {int(wrong[0])}")
    return tuple(reference.dispatch(expert_indices, num_experts, capacity_factor, priority, mask))


def permute(x, offsets, choice_of_row, row_of_choice) -> Tensor:
    return reference.permute(x, Plan(offsets, choice_of_row, row_of_choice))


def gather_sum(rows, row_of_choice) -> Tensor:
    """[T, D]: the sum of every token's rows; the backward of ``permute``."""
    (summed,) = wide(rows)
    ones = torch.ones_like(row_of_choice, dtype=summed.dtype)
    plan = Plan(row_of_choice, row_of_choice, row_of_choice)  # combine reads the last field alone
    return reference.combine(summed, ones, plan).to(rows.dtype)


def grouped_linear(rows, weight, bias, offsets) -> Tensor:
    wide_rows, wide_weight, wide_bias = wide(rows, weight, bias)
    return reference.grouped_linear(wide_rows, wide_weight, wide_bias, offsets).to(rows.dtype)


def _grouped_outer(left: Tensor, right: Tensor, owner: Tensor, num_experts: int) -> Tensor:
    """[E, M, N]: sum over the rows of each expert of left[r, :, None] * right[r, None, :]."""
    return torch.stack([torch.where((owner == e)[:, None], left, 0).mT @ right for e in range(num_experts)])


def _grouped_sum(rows: Tensor, owner: Tensor, num_experts: int) -> Tensor:
    """[E, M]: the sum of each expert's rows."""
    return torch.stack([torch.where((owner == e)[:, None], rows, 0).sum(0) for e in range(num_experts)])


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask) -> Outputs:
    num_experts = weight.shape[0]
    owner = reference.expert_of_row(offsets, rows.shape[0])
    filled = (owner < num_experts)[:, None]
    wide_d, wide_rows, wide_weight = wide(d_out, rows, weight)
    wide_d, wide_rows = torch.where(filled, wide_d, 0), torch.where(filled, wide_rows, 0)
    none = rows.new_empty(0)
    return (
        reference.grouped_linear(wide_d, wide_weight.mT, None, offsets).to(rows.dtype) if output_mask[0] else none,
        _grouped_outer(wide_d, wide_rows, owner, num_experts).to(rows.dtype) if output_mask[1] else none.clone(),
        _grouped_sum(wide_d, owner, num_experts).to(rows.dtype) if output_mask[2] else none.clone(),
    )


def combine(rows, gates, offsets, choice_of_row, row_of_choice) -> Tensor:
    wide_rows, wide_gates = wide(rows, gates)
    plan = Plan(offsets, choice_of_row, row_of_choice)
    return reference.combine(wide_rows, wide_gates, plan).to(rows.dtype)


def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice) -> Outputs:
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
        gate = torch.sigmoid(1.702 * z)
        return grad * (gate + 1.702 * z * gate * (1 - gate))
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    assert activation == "relu", activation
    return torch.where(z > 0, grad, 0)


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
) -> Outputs:  # fmt: skip
    plan = Plan(offsets, choice_of_row, row_of_choice)
    wide_x, w_in, b_in, w_out, b_out, w_gate, b_gate = wide(
        x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias
    )
    z = expert_mlp_z(reference.permute(wide_x, plan), offsets, w_in, b_in, w_gate, b_gate)
    out = reference.grouped_linear(activate_z(z, activation), w_out, b_out, offsets)
    y = reference.combine(out, gates.to(out.dtype), plan).to(x.dtype)
    return y, z.to(x.dtype) if keep_z else x.new_empty(0)


def activate_z(z: Tensor, activation: str) -> Tensor:
    """a [R, H] from z [R, H], or from the gated [2, R, H] (in-projection first, gate second)."""
    return reference.activate(z, activation) if z.dim() == 2 else reference.activate(z[1], activation) * z[0]


def activate_z_backward(da: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz of z's shape from da [R, H]."""
    if z.dim() == 2:
        return activation_backward(da, z, activation)
    return torch.stack([da * reference.activate(z[1], activation), activation_backward(da * z[0], z[1], activation)])


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
) -> Outputs:  # fmt: skip
    plan = Plan(offsets, choice_of_row, row_of_choice)
    need_x, need_gates, need_in, need_out = output_mask
    num_experts, num_rows = in_weight.shape[0], choice_of_row.shape[0]
    owner = reference.expert_of_row(offsets, num_rows)
    wide_dy, wide_x, w_in, w_out, b_out, w_gate = wide(dy, x, in_weight, out_weight, out_bias, gate_weight)
    rows = reference.permute(wide_x, plan)
    if z.numel() == 0:
        z = expert_mlp_z(rows, offsets, *wide(in_weight, in_bias, gate_weight, gate_bias))
    (z,) = wide(z)
    d_row = reference.permute(wide_dy, plan)
    gate = gate_of_row(gates.to(d_row.dtype), choice_of_row)[:, None]
    a = activate_z(z, activation)
    da = reference.grouped_linear(d_row, w_out.mT, None, offsets)
    d_gate_of_row = (a * da).sum(-1)
    if b_out is not None:
        d_gate_of_row = d_gate_of_row + (d_row * b_out[owner.clamp_max(num_experts - 1)]).sum(-1)
    dz = activate_z_backward(gate * da, z, activation)
    dz_in, dz_gate = (dz, dz) if w_gate is None else dz.unbind()  # dz_gate is read of gated experts alone

    def result(wanted: bool, compute) -> Tensor:
        return compute().to(x.dtype) if wanted else x.new_empty(0)

    def dx() -> Tensor:
        d_rows = reference.grouped_linear(dz_in, w_in.mT, None, offsets)
        if w_gate is not None:
            d_rows = d_rows + reference.grouped_linear(dz_gate, w_gate.mT, None, offsets)
        return gather_sum(d_rows, row_of_choice)

    return (
        result(need_x, dx),
        per_choice(d_gate_of_row, row_of_choice).to(gates.dtype) if need_gates else gates.new_empty(0),
        result(need_in, lambda: _grouped_outer(dz_in, rows, owner, num_experts)),
        result(need_in and in_bias is not None, lambda: _grouped_sum(dz_in, owner, num_experts)),
        result(need_out, lambda: _grouped_outer(gate * d_row, a, owner, num_experts)),
        result(need_out and out_bias is not None, lambda: _grouped_sum(gate * d_row, owner, num_experts)),
        result(need_in and gate_weight is not None, lambda: _grouped_outer(dz_gate, rows, owner, num_experts)),
        result(need_in and gate_bias is not None, lambda: _grouped_sum(dz_gate, owner, num_experts)),
    )


def expert_mlp_z(rows, offsets, in_weight, in_bias, gate_weight, gate_bias) -> Tensor:
    """z [R, H], or [2, R, H] for gated experts, from permuted rows."""
    z = reference.grouped_linear(rows, in_weight, in_bias, offsets)
    if gate_weight is None:
        return z
    return torch.stack([z, reference.grouped_linear(rows, gate_weight, gate_bias, offsets)])


def dense_mlp(x, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias, activation) -> Tensor:
    z = F.linear(x, in_weight, in_bias)
    if gate_weight is None:
        a = reference.activate(z, activation)
    else:
        a = reference.activate(F.linear(x, gate_weight, gate_bias), activation) * z
    return F.linear(a, out_weight, out_bias)
