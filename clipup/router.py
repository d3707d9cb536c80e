"""The router: a linear layer without bias, softmax, the K best experts of every token, and a slot for each choice.

Axis legend: ``T`` tokens, ``D`` model width, ``E`` experts, ``K`` choices a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipup_kernels import Gating, Plan, dispatch, router_logits, topk_gating

from . import losses
from .config import MoEConfig

INIT_STD = 0.02
"""Standard deviation of a fresh router's weight. On normalised input its logits then have a deviation of 0.02*sqrt(D),
0.6 at D = 768: experts start out unequal enough to be told apart, and no token starts with a sure choice."""


class Routing(NamedTuple):
    """Where the tokens of one forward go, and what losses and metrics need to know about it."""

    gates: Tensor
    """[T, K] float32: weights of the choices, normalised as configured."""
    plan: Plan
    """Which (token, choice) pair has which row; over-capacity pairs have none."""
    gating: Gating
    """The choices before any was dropped."""
    logits: Tensor
    """[T, E] float32, without noise."""
    noisy_logits: Tensor
    """[T, E] float32: what the choices were made from; ``logits`` itself when there is no noise."""
    mask: Tensor | None
    """[T] bool: tokens that take part; None means all."""


class Router(nn.Module):
    """Sends every token to K of E experts. Parameter: ``weight`` [E, D]; logits are float32 whatever its type.

    Args:
        d_model: D.
        config: how to route; read at every forward, so that assigning another config to ``self.config`` takes effect.
    """

    def __init__(
        self,
        d_model: int,
        config: MoEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x: [T, D], floating; mask: [T] bool, True takes part. Autocast is expected to be off."""
        config = self.config
        logits = router_logits(x, self.weight.to(torch.promote_types(x.dtype, torch.float32)), mask)
        noisy_logits = logits
        if self.training and config.router_noise > 0:
            noisy_logits = logits + torch.randn_like(logits) * (config.router_noise / config.num_experts)
        gating = topk_gating(noisy_logits, config.top_k, config.normalize_gates == "before_drop", mask=mask)
        plan = dispatch(
            gating.experts,
            config.num_experts,
            config.capacity_factor if self.training else config.eval_capacity_factor,
            priority=gating.top_prob.detach() if config.priority else None,
            mask=mask,
        )
        gates = gating.gates
        if config.normalize_gates == "after_drop":
            gates = renormalize_kept(gates, plan)
        return Routing(gates, plan, gating, logits, noisy_logits, mask)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.weight.shape[0]}, top_k={self.config.top_k}"


def renormalize_kept(gates: Tensor, plan: Plan) -> Tensor:
    """Scales every token's gates to sum to 1 over the choices that got a slot, and to 0 where none did
    (Sparse Upcycling, arXiv 2212.05055). With K = 1 a kept gate is always 1: the router learns from its losses alone.

    gates: [T, K] -> [T, K].
    """
    kept = gates.where(plan.row_of_choice >= 0, 0)
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)


def weighted_losses(routing: Routing, config: MoEConfig) -> Tensor:
    """[] float32: the sum of the auxiliary losses that have a weight (at least one must), each times its weight."""
    gating, mask = routing.gating, routing.mask
    terms = []
    if config.balance_weight > 0:
        terms.append(config.balance_weight * losses.load_balance(gating.mean_probs, gating.picks, config.balance))
    if config.z_weight > 0:
        terms.append(config.z_weight * gating.z_loss)
    if config.importance_weight > 0:
        noisy = routing.noisy_logits is not routing.logits
        mean_probs = losses.mean_over_tokens(routing.logits.softmax(-1), mask) if noisy else gating.mean_probs
        terms.append(config.importance_weight * losses.importance(mean_probs))
    if config.load_weight > 0:
        noise_std = config.router_noise / config.num_experts
        load = losses.load(routing.logits, routing.noisy_logits, noise_std, config.top_k, mask)
        terms.append(config.load_weight * load)
    if config.local_entropy_weight > 0:
        terms.append(config.local_entropy_weight * losses.local_entropy(routing.noisy_logits, mask))
    if config.global_entropy_weight > 0:
        loss = losses.global_entropy(gating.mean_probs, config.global_entropy_threshold)
        terms.append(config.global_entropy_weight * loss)
    return torch.stack(terms).sum()
