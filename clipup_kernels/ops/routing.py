"""The routing ops: ``router_logits``, ``topk_gating`` and ``dispatch``.

    x --router_logits--> logits --topk_gating--> gates, expert_indices --dispatch--> plan
    x, gates, plan --expert_mlp--> y          = permute -> GEMM, bias, activation -> GEMM, bias -> combine

The registered ops (``torch.ops.clipup.*``) take and return tensors; the functions here check their arguments, call them
and wrap the results. Shapes are explained in ``types.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..types import Gating, Plan
from .register import define, non_differentiable, save_inputs


def _gating_context(ctx, inputs, output):
    logits, _, renormalize, _, mask = inputs
    _, expert_indices, _, _, _, tokens_per_expert = output
    ctx.save_for_backward(logits, expert_indices, mask)
    ctx.renormalize = renormalize
    ctx.mark_non_differentiable(expert_indices, tokens_per_expert)
    ctx.set_materialize_grads(False)


def _gating_gradients(ctx, needs, d_gates, d_expert_indices, d_top_prob, d_mean_probs, d_z_loss, d_tokens_per_expert):
    logits, expert_indices, mask = ctx.saved_tensors
    d_logits = _topk_gating_backward(
        logits, expert_indices, ctx.renormalize, mask, d_gates, d_top_prob, d_mean_probs, d_z_loss
    )
    return {"logits": d_logits}


_topk_gating = define(
    "topk_gating(Tensor logits, int k, bool renormalize, Tensor? selection_bias=None, Tensor? mask=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    setup_context=_gating_context,
    backward=_gating_gradients,
)


_topk_gating_backward = define(
    "topk_gating_backward(Tensor logits, Tensor expert_indices, bool renormalize, Tensor? mask=None,"
    " Tensor? d_gates=None, Tensor? d_top_prob=None, Tensor? d_mean_probs=None, Tensor? d_z_loss=None) -> Tensor",
)


def topk_gating(
    logits: Tensor, k: int, renormalize: bool, selection_bias: Tensor | None = None, mask: Tensor | None = None
) -> Gating:
    """Softmax over the experts and the ``k`` best of them for every token. Which experts a token with a NaN gets, among
    its logits or in ``selection_bias``, is not specified; they are valid and differ.

    Args:
        logits: [T, E] float32 router logits.
        k: choices per token, 1 <= k <= E.
        renormalize: divide a token's gates by their sum (GShard, arXiv 2006.16668), before any capacity is applied.
            They sum to 1 even where a bias chooses experts whose probabilities underflow; a logit of -inf gives 0.
        selection_bias: [E] float32, added to the probabilities for the choice only; gates are not biased
            (loss-free balancing, arXiv 2408.15664).
        mask: [T] bool, False for masked tokens: they get gates 0 and expert indices -1 and enter no statistic.

    Returns:
        Gating; ties go to the lowest expert index. Differentiable in gates, top_prob, mean_probs and z_loss.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("logits", logits, ("T", "E"), (torch.float32, torch.float64), logits)
    num_tokens, num_experts = logits.shape
    checks.top_k(k, num_experts)
    checks.boolean("renormalize", renormalize)
    checks.optional("selection_bias", selection_bias, (num_experts,), (logits.dtype,), logits)
    checks.optional("mask", mask, (num_tokens,), (torch.bool,), logits)
    return Gating(*_topk_gating(logits, k, renormalize, selection_bias, mask))


_dispatch = define(
    "dispatch(Tensor expert_indices, int num_experts, float? capacity_factor=None, Tensor? priority=None,"
    " Tensor? mask=None) -> (Tensor, Tensor, Tensor)",
    setup_context=non_differentiable,
)


def dispatch(
    expert_indices: Tensor,
    num_experts: int,
    capacity_factor: float | None = None,
    priority: Tensor | None = None,
    mask: Tensor | None = None,
) -> Plan:
    """Computes the plan of rows sorted by expert, within the experts' capacity; it moves no tokens (``permute`` does).

    An expert takes at most ``ceil(capacity_factor * K * T / E)`` rows (computed in float64), T the unmasked tokens;
    ``None`` drops nothing. Rows go to all first choices before any second choice; inside a choice by token
    position, or by descending ``priority`` (batch-priority routing, V-MoE, arXiv 2106.05974), ties by position.

    Args:
        expert_indices: [T, K] int32 from ``topk_gating``; a token with only -1 is masked.
        num_experts: E, at most ``MAX_EXPERTS``.
        capacity_factor: positive, or None.
        priority: [T] float32, ``Gating.top_prob`` in V-MoE; NaN comes last.
        mask: [T] bool, False for masked tokens.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on the CPU also an expert index outside of [-1, E).
    """
    checks.tensor("expert_indices", expert_indices, ("T", "K"), (torch.int32,), expert_indices)
    checks.num_experts(num_experts)
    checks.capacity_factor(capacity_factor)
    num_tokens = expert_indices.shape[0]
    checks.optional("priority", priority, (num_tokens,), (torch.float32, torch.float64), expert_indices)
    checks.optional("mask", mask, (num_tokens,), (torch.bool,), expert_indices)
    priority = None if priority is None else priority.detach().float()
    factor = None if capacity_factor is None else float(capacity_factor)
    return Plan(*_dispatch(expert_indices, num_experts, factor, priority, mask))


def _logits_gradients(ctx, needs, d_logits):
    d_x, d_weight = _router_logits_backward(d_logits, *ctx.saved_tensors, [needs["x"], needs["weight"]])
    return {"x": d_x, "weight": d_weight}


_router_logits = define(
    "router_logits(Tensor x, Tensor weight, Tensor? mask=None) -> Tensor",
    setup_context=save_inputs,
    backward=_logits_gradients,
    flops=lambda arguments: 2 * arguments["x"][0] * math.prod(arguments["weight"]),
)


_router_logits_backward = define(
    "router_logits_backward(Tensor d_logits, Tensor x, Tensor weight, Tensor? mask, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    flops=lambda arguments: 2 * arguments["x"][0] * math.prod(arguments["weight"]) * sum(arguments["output_mask"]),
)


def router_logits(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """``logits[t] = weight @ x[t]`` with products and sums in float32, for every type of tokens.

    x itself is saved for backward; the C++ and Triton kernels make no float32 copy of it.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64.
        weight: [E, D] float32 (float64 for float64).
        mask: [T] bool, False for masked tokens: they are not read (padding may hold NaN); their logits and gradients
            are 0.

    Returns:
        [T, E] of weight's type.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: on a second derivative.
    """
    checks.tensor("x", x, ("T", "D"), checks.FLOATING, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.tensor("weight", weight, ("E", x.shape[1]), (wide,), x)
    checks.optional("mask", mask, (x.shape[0],), (torch.bool,), x)
    return _router_logits(x, weight, mask)
