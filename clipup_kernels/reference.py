"""The reference for tests: every op of this package in a few lines of plain torch, for any device and floating dtype.

It favors readability over speed: every expert runs on every row and masks the rows of others, so nothing here depends
on values (no host synchronization) and autograd differentiates all of it. ``types.py`` explains the shapes; the public
functions of the same names in ``clipup_kernels`` document the ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Gating, Plan


def router_logits(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        x = torch.where(mask[:, None], x, 0)
    return F.linear(x.to(weight.dtype), weight)


def topk_gating(
    logits: Tensor, k: int, renormalize: bool, selection_bias: Tensor | None = None, mask: Tensor | None = None
) -> Gating:
    num_experts = logits.shape[1]
    if mask is None:
        mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
    logits = torch.where(mask[:, None], logits, 0)  # masked rows may hold NaN
    probs = logits.softmax(-1)
    scores = logits if selection_bias is None else probs + selection_bias  # logits order as probs do, without underflow
    expert_indices = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    gates = probs.gather(1, expert_indices)
    if renormalize:
        gates = renormalize_gates(gates, logits.gather(1, expert_indices))
    share = mask.to(probs.dtype) / mask.sum().clamp_min(1)
    chosen = (expert_indices[..., None] == torch.arange(num_experts, device=logits.device)) & mask[:, None, None]
    return Gating(
        gates=torch.where(mask[:, None], gates, 0),
        expert_indices=torch.where(mask[:, None], expert_indices, -1).int(),
        top_prob=torch.where(mask, probs.max(-1).values, 0),
        mean_probs=share @ probs,
        z_loss=share @ logits.logsumexp(-1).square(),
        tokens_per_expert=chosen.sum(0).int(),
    )


def renormalize_gates(gates: Tensor, logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Gates divided by their sum over the choices kept: the softmax over the logits of these. It sums to 1 even where
    the probabilities underflow. Choices that are not kept, or whose logit is -inf, get 0. A NaN stays.

    gates, logits: [..., K]; kept: [..., K] bool, None for all.
    """
    finite = logits != -torch.inf
    kept = finite if kept is None else kept & finite
    shares = logits.where(kept, torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(gates.isnan(), gates, shares).where(kept, 0)


def serving_order(priority: Tensor) -> Tensor:
    """[T] int64: tokens by descending priority [T], ties by position, NaN last."""
    return priority.where(~priority.isnan(), -torch.inf).argsort(descending=True, stable=True)


def dispatch(
    expert_indices: Tensor,
    num_experts: int,
    capacity_factor: float | None = None,
    priority: Tensor | None = None,
    mask: Tensor | None = None,
) -> Plan:
    num_tokens, k = expert_indices.shape
    device, num_rows = expert_indices.device, num_tokens * k
    routed = ((expert_indices >= 0) & (expert_indices < num_experts)).any(1)
    if mask is not None:
        routed &= mask
    order = torch.arange(num_tokens, device=device)
    if priority is not None:
        order = serving_order(priority)
    # Slots in serving order: choice by choice, inside a choice token by token.
    choice = (order * k + torch.arange(k, device=device)[:, None]).flatten()
    owner = torch.where(routed[:, None], expert_indices, -1).flatten()[choice].long()
    hits = owner[:, None] == torch.arange(num_experts, device=device)
    if capacity_factor is not None:
        capacity = (capacity_factor * k * routed.sum(dtype=torch.float64) / num_experts).ceil()
        hits &= hits.cumsum(0) <= capacity
    owner = torch.where(hits.any(1), owner, num_experts)
    offsets = F.pad(hits.sum(0).cumsum(0), (1, 0)).int()
    choice = choice[owner.argsort(stable=True)]
    rows = torch.arange(num_rows, device=device)
    filled = rows < offsets[-1]
    row_of_choice = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_of_choice[choice] = torch.where(filled, rows, -1).int()
    return Plan(offsets, torch.where(filled, choice, -1).int(), row_of_choice.view(num_tokens, k))


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """[R] int64: the expert that owns each row, ``E`` for empty rows."""
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True)


def permute(x: Tensor, plan: Plan) -> Tensor:
    choice = plan.choice_of_row.long()
    k = plan.row_of_choice.shape[1]
    return torch.where((choice >= 0)[:, None], x[choice.clamp_min(0) // k], 0)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    owner = expert_of_row(offsets, rows.shape[0])[:, None]
    rows = torch.where(owner < weight.shape[0], rows, 0)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        out = torch.where(owner == expert, F.linear(rows, weight[expert], None if bias is None else bias[expert]), out)
    return out


def combine(rows: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    row = plan.row_of_choice.long()
    picked = torch.where((row >= 0)[..., None], rows[row.clamp_min(0)], 0)
    gates = torch.where(row >= 0, gates.to(picked.dtype), 0)
    return (gates[..., None] * picked).sum(1)


def at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.itemsize < 4 else z


def activate(z: Tensor, activation: str) -> Tensor:
    """``activation(z)`` for every name in ``ACTIVATIONS``."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":  # OpenAI's CLIP: x * sigmoid(1.702 x)
        wide = at_least_float32(z)  # rounded once, as torch's own activations are
        return (wide * torch.sigmoid(1.702 * wide)).to(z.dtype)
    return {"relu": F.relu, "silu": F.silu}[activation](z)


def expert_mlp(
    x: Tensor,
    gates: Tensor,
    plan: Plan,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    activation: str = "gelu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    rows = permute(x, plan)
    z = grouped_linear(rows, in_weight, in_bias, plan.offsets)
    if gate_weight is None:
        a = activate(z, activation)
    else:
        a = activate(grouped_linear(rows, gate_weight, gate_bias, plan.offsets), activation) * z
    return combine(grouped_linear(a, out_weight, out_bias, plan.offsets), gates, plan)


def expert_glu(
    x: Tensor, gates: Tensor, plan: Plan, gate_in_weight: Tensor, out_weight: Tensor, activation: str = "silu"
) -> Tensor:
    gate_weight, in_weight = gate_in_weight.chunk(2, dim=1)
    return expert_mlp(x, gates, plan, in_weight, None, out_weight, None, activation, gate_weight)
