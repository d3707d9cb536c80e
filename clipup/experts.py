"""Experts with a layer norm or a dropout between their projections, out of the public parts of ``expert_mlp``.

Axis legend: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts, ``K`` choices a token, ``R = T*K`` rows
(one a (token, choice) pair).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipup_kernels import Plan, combine, grouped_linear, permute
from clipup_kernels.reference import activate


def unfused_mlp(
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
    *,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-5,
    dropout: float = 0.0,
) -> Tensor:
    """What ``clipup_kernels.expert_mlp`` computes, with a dropout and the expert's own layer norm in the middle.

    ``W_out norm(dropout(act(W_in x + b_in))) + b_out``, gated: ``act(W_gate x + b_gate) * (W_in x + b_in)`` inside.
    Every step is an op that autograd differentiates, so more is saved for backward than by the fused op.

    Args:
        x, gates, plan, the weights and biases, activation: as of ``expert_mlp``.
        ln_weight, ln_bias: [E, H], or both None for no norm. ln_eps: what the norm adds to the variance.
        dropout: probability; drawn anew at every call.

    Returns:
        y: [T, D] of x's type.
    """
    rows = permute(x, plan)
    hidden = grouped_linear(rows, in_weight, in_bias, plan.offsets)
    if gate_weight is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(grouped_linear(rows, gate_weight, gate_bias, plan.offsets), activation) * hidden
    hidden = F.dropout(hidden, dropout)
    if ln_weight is not None:
        hidden = grouped_layer_norm(hidden, ln_weight, ln_bias, plan.offsets, ln_eps)
    return combine(grouped_linear(hidden, out_weight, out_bias, plan.offsets), gates, plan)


def grouped_layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm of every row with the weight and bias of the expert that owns it, computed in float32 or wider.

    Weight and bias are looked up as embeddings, whose gradient is summed in a fixed order.

    Args:
        rows: [R, H], expert-sorted as by ``permute``.
        weight, bias: [E, H], of any floating type.
        offsets: [E+1] int32, ``Plan.offsets``.
        eps: added to the variance.

    Returns:
        [R, H] of rows' type. What stands in empty rows means nothing.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    index = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets[1:].contiguous(), index, right=True).clamp_max(weight.shape[0] - 1)
    normed = F.layer_norm(rows.to(wide), rows.shape[-1:], eps=eps)
    return (normed * F.embedding(owner, weight.to(wide)) + F.embedding(owner, bias.to(wide))).to(rows.dtype)
