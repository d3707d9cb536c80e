"""The router: a linear layer without bias, router probabilities, top-K expert selection, and a slot for each choice.

Axis legend: ``T`` tokens, ``D`` model width, ``E`` experts, ``K`` choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from clipup_kernels import Gating, Plan, dispatch, router_logits, topk_gating
from clipup_kernels.reference import renormalize_gates

from .. import checks
from . import losses
from .config import MoEConfig, ScoreFunction, check_config
from .expert_parallel import whole
from .step_counts import StepCounts

INIT_STD = 0.02
"""Standard deviation of the initial router weights. On normalized input the logits have a standard deviation of
0.02*sqrt(D), 0.6 at D = 768. The initial router is small: experts differ, and no token starts with a confident
choice."""


class Routing(NamedTuple):
    """The routing of one forward pass, with what losses and metrics need."""

    gates: Tensor
    """[T, K] float32: weights of the choices, normalized as configured."""
    plan: Plan
    """The row of each (token, choice) pair; pairs over capacity have none."""
    gating: Gating
    """The choices before dropping."""
    logits: Tensor
    """[T, E] float32, without noise."""
    noisy_logits: Tensor
    """[T, E] float32: the logits that selection uses; ``logits`` itself without noise."""
    mask: Tensor | None
    """[T] bool: tokens that are not masked; None means all."""


class TokenRouting(NamedTuple):
    """Where each token of a layer's input went; the leading dimensions are those of the input."""

    gates: Tensor
    """[..., K] float32, with a derivative: weights of the choices. That of a dropped choice is not added to y."""
    experts: Tensor
    """[..., K] int32: the experts chosen, by descending probability; -1 for a masked token. With expert choice
    [..., E], and -1 where no expert chose the token."""
    kept: Tensor
    """[..., K] bool: False for choices that were dropped, for lack of capacity or because the token is masked."""

    @classmethod
    def of(cls, routing: Routing, leading: torch.Size) -> TokenRouting:
        shape = (*leading, routing.gates.shape[-1])
        kept = routing.plan.row_of_choice >= 0
        return cls(routing.gates.view(shape), routing.gating.expert_indices.view(shape), kept.view(shape))


class Router(nn.Module):
    """Selects K of E experts for each token. Parameter: ``weight`` [E, D]; logits are float32 whatever its type.

    Buffer: ``selection_bias`` [E], float32 whatever type the module is cast to, None without ``config.selection_bias``.
    The K experts with the largest ``probability + bias`` are selected; the gates are the probabilities.
    ``clipup.update_selection_bias`` updates it.

    Args:
        d_model: D.
        config: the routing options; read at every forward pass, so that assigning ``self.config`` takes effect.
    """

    weight: nn.Parameter
    selection_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        config: MoEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.width("d_model", d_model)
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
        """Re-initializes the router with one row per ``granularity`` neighbors (as NVIDIA's virtual groups, arXiv
        2410.07524, have): their logits are equal up to rounding, so top-K selects whole groups until training makes
        them diverge. A token can get shards of two groups only if the groups' logits are within rounding of each other.
        """
        self.reset_parameters()
        one_a_group = self.weight[:: self.config.granularity].clone()
        self.weight.copy_(one_a_group.repeat_interleave(self.config.granularity, 0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves the selection bias with the module but keeps its type: an update of 1e-3 is lost in bfloat16."""
        exact = self.selection_bias
        super()._apply(fn, recurse)
        if exact is not None and self.selection_bias.dtype != exact.dtype:
            self.selection_bias = exact.to(self.selection_bias.device)
        return self

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits of all experts, [T, E] float32 (float64 where x is). What a router of your own overrides.

        x: [T, D], floating; mask: [T] bool, False for masked tokens, whose logits are not read. Autocast is off.
        """
        return router_logits(x, whole(self.weight).to(torch.promote_types(x.dtype, torch.float32)), mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x: [T, D], floating; mask: [T] bool, False for masked tokens. Autocast must be off."""
        config = self.config
        logits = self.logits(x, mask)
        noisy_logits = logits
        if self.training and config.router_noise > 0:
            noisy_logits = logits + torch.randn_like(logits) * (config.router_noise / config.num_experts)
        bias = None if self.selection_bias is None else self.selection_bias.to(logits.dtype)
        scores = log_scores(noisy_logits, config.score_function)
        if config.routing == "expert_choice":
            room = config.expert_choice_factor(self.training)
            gating, plan = expert_choice(scores, config, room, mask, self._draw(x, room))
            return Routing(gating.gates, plan, gating, logits, noisy_logits, mask)
        gating = topk_gating(scores, config.top_k, config.normalize_gates == "before_drop", bias, mask)
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        priority = draw = self._draw(x, factor)
        if config.priority:
            priority = gating.top_prob.detach()
            if draw is not None:
                priority = -places(priority.nan_to_num(-1.0), draw).float()
        plan = dispatch(gating.expert_indices, config.num_experts, factor, priority, mask)
        gates = gating.gates
        if config.normalize_gates == "after_drop":
            gates = renormalize_kept(scores, gating, plan)
        return Routing(gates, plan, gating, logits, noisy_logits, mask)

    def _draw(self, x: Tensor, factor: float | None) -> Tensor | None:
        """[T] float32: the order, from torch's random state, in which tokens get the slots of training. None in
        evaluation, and where every expert has room for all tokens.

        By position, what is dropped would tell a sample's row. The two towers of a CLIP, which see a pair in the same
        row, would learn to match rows, and so would layers that draw equal orders.
        """
        if not self.training or factor is None or factor * self.config.top_k >= self.config.num_experts:
            return None
        return torch.rand(x.shape[0], dtype=torch.float32, device=x.device)

    def has_hooks(self) -> bool:
        """Whether a call of this module runs more than its forward: hooks of its own, or of all modules."""
        own = self._forward_hooks or self._forward_pre_hooks
        return bool(own or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)

    def in_one_op(self) -> dict[str, Any] | None:
        """The arguments by which ``packed_sparse_mlp`` routes as this module does in inference; None if only calling it
        does: hooks, options that the op lacks."""
        config = self._config
        other = config.routing != "token_choice" or config.score_function != "softmax"
        if self.training or self.has_hooks() or other or config.normalize_gates == "after_drop":
            return None
        return {
            "router_weight": whole(self.weight).float(),
            "k": config.top_k,
            "renormalize": config.normalize_gates == "before_drop",
            "capacity_factor": config.eval_capacity_factor,
            "by_priority": config.priority,
            "selection_bias": self.selection_bias,
        }

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.weight.shape[0]}, top_k={self.config.top_k}"


def _structure(config: MoEConfig) -> dict[str, Any]:
    """The options that determine a layer's parameters and buffers."""
    named = {name: getattr(config, name) for name in ("num_experts", "granularity", "shared_expert")}
    return named | {"selection_bias": config.selection_bias != "none"}


def log_scores(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """Scores [T, E] whose softmax gives the router probabilities.

    For softmax these are the logits. For sigmoid they are ``log(sigmoid(logits))``, whose softmax is
    ``p_e = s_e / sum_j s_j`` with ``s_e = sigmoid(logit_e)``: the affinities of DeepSeek-V3 (arXiv 2412.19437, eq.
    12-16). Its gates, the selected s_e divided by their sum, are those of ``normalize_gates="before_drop"``, and its
    balance loss averages p_e. One difference: a selection bias is added to p_e here and to s_e there.
    """
    return F.logsigmoid(logits) if score_function == "sigmoid" else logits


def z_loss(of_scores: Tensor, logits: Tensor, mask: Tensor | None, config: MoEConfig) -> Tensor:
    """[] float32: the router z-loss of the logits.

    Args:
        of_scores: the z-loss of ``log_scores``; softmax's are the logits.
        logits: [T, E].
        mask: [T] bool or None.
    """
    return of_scores if config.score_function == "softmax" else losses.router_z(logits, mask)


def places(values: Tensor, draw: Tensor | None) -> Tensor:
    """[T, ...] int64: the place of each token by descending ``values`` [T, ...] along axis 0; equal ones by
    descending ``draw`` [T], or by position."""
    order = torch.arange(values.shape[0], device=values.device) if draw is None else draw.argsort(descending=True)
    return order[values[order].argsort(dim=0, descending=True, stable=True)].argsort(dim=0)


def expert_choice(
    scores: Tensor, config: MoEConfig, factor: float, mask: Tensor | None, draw: Tensor | None = None
) -> tuple[Gating, Plan]:
    """Expert choice routing (arXiv 2202.09368, section 3.2): each of E experts takes the ``ceil(factor*K*N/E)`` of N
    unmasked tokens with the largest router probabilities p; equal ones by ``draw``, or by position. The gate is p, or
    with normalized gates p over the sum of those of the token's experts (Sparse Upcycling, arXiv 2212.05055).

    scores: [T, E] of ``log_scores``; mask: [T] bool; draw: [T]. In the results a token has E choices by descending
    gate; where no expert chose it, the index is -1 and the gate 0. A NaN ranks first, so that it shows.
    """
    num_tokens, num_experts = scores.shape
    mask = torch.ones_like(scores[:, 0], dtype=torch.bool) if mask is None else mask
    probs = scores.softmax(-1)
    ranked = probs.detach().nan_to_num(2.0).where(mask[:, None], -1.0)
    capacity = (factor * config.top_k * mask.sum().double() / num_experts).ceil()
    chosen = (places(ranked, draw) < capacity) & mask[:, None]
    gates = probs.where(chosen, 0)
    if config.normalize_gates != "none":
        gates = renormalize_gates(probs, scores, chosen)
    order = ranked.where(chosen, -1.0).argsort(dim=-1, descending=True, stable=True)
    indices = torch.where(chosen.gather(1, order), order, -1).int()
    # the statistics of the distribution do not depend on who chooses
    of_tokens = topk_gating(scores, 1, False, mask=mask)
    counts = chosen.sum(0, dtype=torch.int32)[None]
    gating = of_tokens._replace(gates=gates.gather(1, order), expert_indices=indices, tokens_per_expert=counts)
    return gating, dispatch(indices, num_experts, mask=mask)


def renormalize_kept(scores: Tensor, gating: Gating, plan: Plan) -> Tensor:
    """Each token's gates, which sum to 1 over the choices that got a slot, or to 0 if none did (Sparse Upcycling,
    arXiv 2212.05055). With K = 1 a kept gate is always 1: the router learns from the auxiliary losses alone.

    scores: [T, E] of ``log_scores`` -> [T, K].
    """
    chosen = scores.gather(1, gating.expert_indices.long().clamp_min(0))
    return renormalize_gates(gating.gates, chosen, plan.row_of_choice >= 0)


def weighted_losses(routing: Routing, config: MoEConfig, step: StepCounts | None = None) -> Tensor:
    """[] float32: the weighted sum of the auxiliary losses; at least one must have a weight.

    step: the counts of all batches of the step, over which the losses are averaged; None: this batch alone.
    """
    gating, mask = routing.gating, routing.mask
    counts = gating.tokens_per_expert if step is None else step.tokens_per_expert
    noise_std = config.router_noise / config.num_experts

    def noiseless_mean() -> Tensor:
        if routing.noisy_logits is routing.logits:
            return gating.mean_probs
        return losses.mean_over_tokens(log_scores(routing.logits, config.score_function).softmax(-1), mask)

    formulas = {
        "balance_weight": lambda: losses.load_balance(gating.mean_probs, counts, config.balance, config.granularity),
        "z_weight": lambda: z_loss(gating.z_loss, routing.noisy_logits, mask, config),
        "importance_weight": lambda: losses.importance(noiseless_mean()),
        "load_weight": lambda: losses.load(routing.logits, routing.noisy_logits, noise_std, config.top_k, mask),
        "local_entropy_weight": lambda: losses.local_entropy(
            log_scores(routing.noisy_logits, config.score_function), mask
        ),
        "global_entropy_weight": lambda: losses.global_entropy(gating.mean_probs, config.global_entropy_threshold),
    }
    weights = {name: getattr(config, name) for name in formulas}
    total = torch.stack([weight * formulas[name]() for name, weight in weights.items() if weight > 0]).sum()
    return total if step is None else total * step.weight_of(gating.tokens_per_expert)
