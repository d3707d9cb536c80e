"""Experts: stacked MLPs and their computation, by the fused op or, with a norm or dropout, by its unfused parts.

Axis legend: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts, ``K`` choices per token, ``R = T*K``
rows (one per (token, choice) pair).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipup_kernels import ACTIVATIONS, PackedWeight, Plan, combine, dense_mlp, expert_mlp, grouped_linear, permute
from clipup_kernels.checks import FLOATING
from clipup_kernels.reference import activate

from .. import checks
from . import expert_parallel
from .expert_parallel import local

_DTYPES = ", ".join(map(str, FLOATING))
_OPERANDS = ("in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias")
_VECTORS = ("in_bias", "out_bias", "gate_bias", "ln_weight", "ln_bias")


class Experts(nn.Module):
    """E MLPs of the same shape, stacked.

    Parameters: ``in_weight`` [E, H, D], ``in_bias`` [E, H], ``out_weight`` [E, D, H], ``out_bias`` [E, D]; gated ones
    also ``gate_weight`` [E, H, D], ``gate_bias`` [E, H]; with a norm ``ln_weight`` and ``ln_bias`` [E, H]. Absent ones
    are None. The options are explained in ``SparseMoE``.
    """

    in_weight: nn.Parameter
    in_bias: nn.Parameter | None
    out_weight: nn.Parameter
    out_bias: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None
    ln_weight: nn.Parameter | None
    ln_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        norm: Literal["layer"] | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.width("d_model", d_model)
        checks.width("d_hidden", d_hidden)
        checks.boolean("bias", bias)
        checks.boolean("gated", gated)
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.one_of("norm", norm or "layer", ("layer",))
        checks.positive_number("norm_eps", norm_eps)
        checks.number("dropout", dropout)
        checks.check("dropout", dropout, 0 <= dropout < 1, "a probability below 1")
        checks.check("dtype", dtype, dtype is None or dtype in FLOATING, f"None or one of {_DTYPES}", TypeError)
        self.d_model, self.d_hidden, self.activation = d_model, d_hidden, activation
        self.norm_eps, self.dropout = norm_eps, dropout

        for name, wanted, *shape in (
            ("in_weight", True, d_hidden, d_model),
            ("in_bias", bias, d_hidden),
            ("out_weight", True, d_model, d_hidden),
            ("out_bias", bias, d_model),
            ("gate_weight", gated, d_hidden, d_model),
            ("gate_bias", gated and bias, d_hidden),
            ("ln_weight", norm is not None, d_hidden),
            ("ln_bias", norm is not None, d_hidden),
        ):
            values = torch.empty(num_experts, *shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.reset_experts()

    def reset_experts(self) -> None:
        """Re-initializes every expert independently, as ``nn.Linear`` does."""
        for name, fan_in in (("in", self.d_model), ("out", self.d_hidden), ("gate", self.d_model)):
            for parameter in (getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.ln_weight is not None and self.ln_bias is not None:
            nn.init.ones_(self.ln_weight)
            nn.init.zeros_(self.ln_bias)

    def set_experts(self, values: dict[str, Tensor], requires_grad: dict[str, bool]) -> None:
        """Makes these tensors, without a copy, the parameters of these names; they may be on another device."""
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.contiguous(), requires_grad=requires_grad[name]))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, by timm's convention: biases and norms, which are stacked to
        [E, H] and look like matrices."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _VECTORS}

    def run_experts(self, tokens: Tensor, gates: Tensor, plan: Plan, dtype: torch.dtype | None) -> Tensor:
        """tokens [T, D] -> [T, D], computed in ``dtype``; None means the parameters' type."""
        x = cast(tokens, dtype)
        group = self.expert_group()
        if group is None:
            return self._run_own_experts(x, gates, plan, dtype)
        compute = partial(self._run_own_experts, dtype=dtype)
        return expert_parallel.computed_where_the_experts_are(x, gates, plan, group, compute)

    def expert_group(self) -> dist.ProcessGroup | None:
        """The ranks over which the experts are divided; None if this process has all of them."""
        return expert_parallel.group_of(self.in_weight)

    def _run_own_experts(self, x: Tensor, gates: Tensor, plan: Plan, dtype: torch.dtype | None) -> Tensor:
        """The experts that this process holds."""
        weights = self.operands(dtype)
        if self.is_fused():
            return expert_mlp(x, gates, plan, **weights, activation=self.activation)
        rows = unfused_mlp(permute(x, plan), plan.offsets, **weights, **self._between())
        return combine(rows, gates, plan)

    def is_fused(self) -> bool:
        """Whether the fused ops compute these experts: no norm, and no active dropout."""
        return self.ln_weight is None and (self.dropout == 0 or not self.training)

    def operands(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """The matrices and biases of this process's experts by their names in the ops, in ``dtype``."""
        return {name: cast(local(getattr(self, name)), dtype) for name in _OPERANDS}

    def _between(self) -> dict[str, Any]:
        """The options of ``unfused_mlp`` between the projections."""
        norm: dict[str, Any] = {name: local(getattr(self, name)) for name in ("ln_weight", "ln_bias")}
        dropout = self.dropout if self.training else 0.0
        return {"activation": self.activation, **norm, "ln_eps": self.norm_eps, "dropout": dropout}


class SharedExpert(Experts):
    """An expert that processes every token (DeepSeekMoE, arXiv 2401.06066, section 3.2). Several such experts are equal
    to one of their combined width."""

    def forward(self, tokens: Tensor, mask: Tensor | None, dtype: torch.dtype | None, gate: float) -> Tensor:
        """gate times the expert's output, [T, D]; 0 where the mask [T] is False."""
        if mask is None:
            return gate * self._mlp(tokens, dtype)
        masked = ~mask[:, None]  # a masked token may hold NaN, which must reach neither y nor a weight's gradient
        return (gate * self._mlp(tokens.masked_fill(masked, 0), dtype)).masked_fill(masked, 0)

    def _mlp(self, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
        x = cast(tokens, dtype)
        if self.is_fused() and not torch.is_grad_enabled():
            weights = {name: of_one_expert(value) for name, value in self.operands(dtype).items()}
            return dense_mlp(x, **weights, activation=self.activation)
        offsets = torch.arange(2, device=x.device, dtype=torch.int32) * x.shape[0]
        return unfused_mlp(x, offsets, **self.operands(dtype), **self._between())


def cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """A tensor, or None, in ``dtype`` unless that is None."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def of_one_expert(weight: Any) -> Any:
    """A weight of one expert, [1, ...], without that axis."""
    if isinstance(weight, PackedWeight):
        block = weight.block[0] if weight.block.shape == weight.shape else weight.block
        return PackedWeight._make((block, weight.shape[1:], *weight[2:]))  # torch.compile cannot trace _replace
    return None if weight is None else weight[0]


def unfused_mlp(
    rows: Tensor,
    offsets: Tensor,
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
    """The experts' MLPs on rows in expert order, with dropout and the expert's own layer norm between the projections.

    ``W_out norm(dropout(act(W_in x + b_in))) + b_out``, gated: ``act(W_gate x + b_gate) * (W_in x + b_in)`` inside.
    Every step is an op that autograd differentiates, so more is saved for backward than by ``expert_mlp``.

    Args:
        rows: [R, D], expert-sorted as by ``permute``.
        offsets: [E+1] int32, ``Plan.offsets``.
        weights, biases, activation: as in ``clipup_kernels.expert_mlp``.
        ln_weight, ln_bias: [E, H], or both None for no norm. ln_eps: added to the variance.
        dropout: probability; drawn at every call.

    Returns:
        [R, D] of rows' type.
    """
    hidden = grouped_linear(rows, in_weight, in_bias, offsets)
    hidden = (
        activate(hidden, activation)
        if gate_weight is None
        else activate(grouped_linear(rows, gate_weight, gate_bias, offsets), activation) * hidden
    )
    hidden = F.dropout(hidden, dropout)
    if ln_weight is not None and ln_bias is not None:
        hidden = grouped_layer_norm(hidden, ln_weight, ln_bias, offsets, ln_eps)
    return grouped_linear(hidden, out_weight, out_bias, offsets)


def grouped_layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm of each row with the weight and bias of the row's expert, computed in float32 or wider.

    Weight and bias are looked up as embeddings, whose gradients are summed in a fixed order.

    Args:
        rows: [R, H], expert-sorted as by ``permute``.
        weight, bias: [E, H], of any floating type.
        offsets: [E+1] int32, ``Plan.offsets``.
        eps: added to the variance.

    Returns:
        [R, H] in rows' type. Empty rows are unspecified.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    index = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets[1:].contiguous(), index, right=True).clamp_max(weight.shape[0] - 1)
    normed = F.layer_norm(rows.to(wide), rows.shape[-1:], eps=eps)
    return (normed * F.embedding(owner, weight.to(wide)) + F.embedding(owner, bias.to(wide))).to(rows.dtype)
