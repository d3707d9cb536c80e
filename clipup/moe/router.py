"""The router: a linear layer without bias, probabilities, the K best experts of every token, a slot for each choice.

Axis legend: ``T`` tokens, ``D`` model width, ``E`` experts, ``K`` choices a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipup_kernels import Gating, Plan, dispatch, router_logits, topk_gating

from .. import checks
from . import losses
from .config import MoEConfig, Score, check_config

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

    Buffer: ``selection_bias`` [E], float32 whatever type the module is cast to, None without ``config.selection_bias``.
    The K experts with the largest ``probability + bias`` are chosen; the gates are the probabilities.
    ``clipup.update_selection_bias`` moves it.

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
        checks.width("d_model", d_model)
        check_config("config", config)
        self._config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model, device=device, dtype=dtype))
        has_bias = config.selection_bias != "none"
        bias = torch.empty(config.num_experts, device=device, dtype=torch.float32) if has_bias else None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    @property
    def config(self) -> MoEConfig:
        return self._config

    @config.setter
    def config(self, config: MoEConfig) -> None:
        check_config("config", config)
        if config.num_experts != self.config.num_experts:
            raise ValueError(
                f"config.num_experts is {config.num_experts}, but the layer has {self.config.num_experts} experts; "
                "make a new layer to change their number"
            )
        held = _structure(self.config)
        for name, wanted in _structure(config).items():
            if wanted != held[name]:
                raise ValueError(
                    f"config.{name} is {getattr(config, name)!r}, but the layer was made with "
                    f"{getattr(self.config, name)!r}; make a new layer to change its parameters"
                )
        self._config = config

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    @torch.no_grad()
    def reset_to_virtual_groups(self) -> None:
        """A fresh router that draws one row for every ``granularity`` neighbours (virtual groups, NVIDIA, arXiv
        2410.07524): their logits are equal to rounding, so that top-K takes whole groups until training has parted
        them. Only where two groups are within rounding of each other can a token get shards of both."""
        self.reset_parameters()
        one_a_group = self.weight[:: self.config.granularity].clone()
        self.weight.copy_(one_a_group.repeat_interleave(self.config.granularity, 0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves the selection bias with the module, but keeps its type: a step of 1e-3 is lost in bfloat16."""
        exact = self.selection_bias
        super()._apply(fn, recurse)
        if exact is not None and self.selection_bias.dtype != exact.dtype:
            self.selection_bias = exact.to(self.selection_bias.device)
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x: [T, D], floating; mask: [T] bool, True takes part. Autocast is expected to be off."""
        config = self.config
        logits = router_logits(x, self.weight.to(torch.promote_types(x.dtype, torch.float32)), mask)
        noisy_logits = logits
        if self.training and config.router_noise > 0:
            noisy_logits = logits + torch.randn_like(logits) * (config.router_noise / config.num_experts)
        bias = None if self.selection_bias is None else self.selection_bias.to(logits.dtype)
        scores = log_scores(noisy_logits, config.score)
        gating = topk_gating(scores, config.top_k, config.normalize_gates == "before_drop", bias, mask)
        if scores is not noisy_logits:
            gating = gating._replace(z_loss=losses.router_z(noisy_logits, mask))
        plan = dispatch(
            gating.expert_indices,
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


def _structure(config: MoEConfig) -> dict[str, Any]:
    """What decides which parameters and buffers a layer has."""
    has_bias = config.selection_bias != "none"
    return {"granularity": config.granularity, "shared_expert": config.shared_expert, "selection_bias": has_bias}


def log_scores(logits: Tensor, score: Score) -> Tensor:
    """Scores [T, E] whose softmax are the router's probabilities.

    Of logits that is softmax itself. Of ``log(sigmoid(logits))`` it is ``p_e = s_e / sum_j s_j`` with
    ``s_e = sigmoid(logit_e)``: the affinities of DeepSeek-V3 (arXiv 2412.19437, eq. 12-16). Its gates, the chosen s_e
    divided by their sum, are those of ``normalize_gates="before_drop"``, and p_e is what its balance loss averages.
    One thing differs: a selection bias is added to p_e here and to s_e there.
    """
    return F.logsigmoid(logits) if score == "sigmoid" else logits


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
        balance = losses.load_balance(gating.mean_probs, gating.tokens_per_expert, config.balance)
        terms.append(config.balance_weight * balance)
    if config.z_weight > 0:
        terms.append(config.z_weight * gating.z_loss)
    if config.importance_weight > 0:
        noisy = routing.noisy_logits is not routing.logits
        mean_probs = gating.mean_probs
        if noisy:
            mean_probs = losses.mean_over_tokens(log_scores(routing.logits, config.score).softmax(-1), mask)
        terms.append(config.importance_weight * losses.importance(mean_probs))
    if config.load_weight > 0:
        noise_std = config.router_noise / config.num_experts
        load = losses.load(routing.logits, routing.noisy_logits, noise_std, config.top_k, mask)
        terms.append(config.load_weight * load)
    if config.local_entropy_weight > 0:
        scores = log_scores(routing.noisy_logits, config.score)
        terms.append(config.local_entropy_weight * losses.local_entropy(scores, mask))
    if config.global_entropy_weight > 0:
        loss = losses.global_entropy(gating.mean_probs, config.global_entropy_threshold)
        terms.append(config.global_entropy_weight * loss)
    return torch.stack(terms).sum()
