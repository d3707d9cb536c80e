"""The public ops: argument checks in front, ``torch.library`` ops behind.

    logits --topk_gating--> gates, experts --dispatch--> plan
    x, gates, plan --expert_mlp--> y          = permute -> GEMM, bias, activation -> GEMM, bias -> combine

The registered ops (``torch.ops.clipup.*``) take and return tensors; the functions here check their arguments, call them
and wrap the results. Shapes are explained in ``types.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .registry import define, non_differentiable
from .types import PLAIN_LAYOUT, Gating, PackedWeight, Plan

# ---------------------------------------------------------------- topk_gating


def _gating_context(ctx, inputs, output):
    logits, _, renormalize, _, mask = inputs
    _, experts, _, _, _, picks = output
    ctx.save_for_backward(logits, experts, mask)
    ctx.renormalize = renormalize
    ctx.mark_non_differentiable(experts, picks)
    ctx.set_materialize_grads(False)


def _gating_backward(ctx, d_gates, d_experts, d_top_prob, d_mean_probs, d_z_loss, d_picks):
    logits, experts, mask = ctx.saved_tensors
    d_logits = _topk_gating_backward(
        logits, experts, ctx.renormalize, mask, d_gates, d_top_prob, d_mean_probs, d_z_loss
    )
    return d_logits, None, None, None, None


_topk_gating = define(
    "topk_gating(Tensor logits, int k, bool renormalize, Tensor? selection_bias=None, Tensor? mask=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    setup_context=_gating_context,
    backward=_gating_backward,
)
_topk_gating_backward = define(
    "topk_gating_backward(Tensor logits, Tensor experts, bool renormalize, Tensor? mask=None, Tensor? d_gates=None,"
    " Tensor? d_top_prob=None, Tensor? d_mean_probs=None, Tensor? d_z_loss=None) -> Tensor",
)


def topk_gating(
    logits: Tensor, k: int, renormalize: bool, selection_bias: Tensor | None = None, mask: Tensor | None = None
) -> Gating:
    """Softmax over the experts and the ``k`` best of them for every token.

    Args:
        logits: [T, E] float32 router logits.
        k: choices a token, 1 <= k <= E.
        renormalize: divide a token's gates by their sum (GShard, arXiv 2006.16668), before any capacity is applied.
        selection_bias: [E] float32, added to the probabilities for choosing only; gates stay the probabilities
            (loss-free balancing, arXiv 2408.15664).
        mask: [T] bool, True where the token takes part. The others get gates 0 and experts -1 and count nowhere.

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


# ---------------------------------------------------------------- dispatch

_dispatch = define(
    "dispatch(Tensor experts, int num_experts, float? capacity_factor=None, Tensor? priority=None, Tensor? mask=None)"
    " -> (Tensor, Tensor, Tensor)",
    setup_context=non_differentiable,
)


def dispatch(
    experts: Tensor,
    num_experts: int,
    capacity_factor: float | None = None,
    priority: Tensor | None = None,
    mask: Tensor | None = None,
) -> Plan:
    """Gives every (token, choice) pair a row, sorted by expert, as far as the experts' capacity goes.

    An expert takes at most ``ceil(capacity_factor * K * T / E)`` rows (computed in float64), T the tokens that take
    part; ``None`` drops nothing. Slots go to all first choices before any second choice; inside a choice by token
    position, or by descending ``priority`` (batch-priority routing, V-MoE, arXiv 2106.05974), ties by position.

    Args:
        experts: [T, K] int32 from ``topk_gating``; a token of -1 takes no part.
        num_experts: E, at most ``MAX_EXPERTS``.
        capacity_factor: positive, or None.
        priority: [T] float32, ``Gating.top_prob`` in V-MoE; NaN goes last.
        mask: [T] bool, True where the token takes part.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on the CPU also an expert index outside of [-1, E).
    """
    checks.tensor("experts", experts, ("T", "K"), (torch.int32,), experts)
    checks.num_experts(num_experts)
    checks.capacity_factor(capacity_factor)
    num_tokens = experts.shape[0]
    checks.optional("priority", priority, (num_tokens,), (torch.float32, torch.float64), experts)
    checks.optional("mask", mask, (num_tokens,), (torch.bool,), experts)
    priority = None if priority is None else priority.detach().float()
    factor = None if capacity_factor is None else float(capacity_factor)
    return Plan(*_dispatch(experts, num_experts, factor, priority, mask))


# ---------------------------------------------------------------- permute


def _permute_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[3])


def _permute_backward(ctx, d_rows):
    (row_of_choice,) = ctx.saved_tensors
    return _gather_sum(d_rows, row_of_choice), None, None, None


_permute = define(
    "permute(Tensor x, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice) -> Tensor",
    setup_context=_permute_context,
    backward=_permute_backward,
)
_gather_sum = define(
    "gather_sum(Tensor rows, Tensor row_of_choice) -> Tensor",
)


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Rows in expert order: [R, D] from x [T, D]; empty rows are 0. Float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("x", x, ("T", "D"), checks.FLOATING, x)
    checks.plan(plan, x.shape[0], x)
    return _permute(x, *plan)


# ---------------------------------------------------------------- grouped_linear


def _grouped_linear_context(ctx, inputs, output):
    rows, weight, bias, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)
    ctx.has_bias = bias is not None


def _grouped_linear_backward_of(ctx, d_out):
    rows, weight, offsets = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = _grouped_linear_backward(d_out, rows, weight, offsets, mask)
    return (*(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None)


_grouped_linear = define(
    "grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    setup_context=_grouped_linear_context,
    backward=_grouped_linear_backward_of,
    flops=lambda rows, weight, bias, offsets, out_shape=None, **kwargs: 2 * rows[0] * weight[1] * weight[2],
)
_grouped_linear_backward = define(
    "grouped_linear_backward(Tensor d_out, Tensor rows, Tensor weight, Tensor offsets, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    flops=lambda d_out, rows, weight, offsets, output_mask, out_shape=None, **kwargs: (
        2 * rows[0] * weight[1] * weight[2] * sum(output_mask[:2])
    ),
)


_packed_grouped_linear = define(
    "packed_grouped_linear(Tensor rows, Tensor packed, Tensor? bias, Tensor offsets, int out_features, str layout)"
    " -> Tensor",
    flops=lambda rows, packed, bias, offsets, out_features, *args, out_shape=None, **kwargs: (
        2 * rows[0] * rows[1] * out_features
    ),
    cpu_only=True,
)


def grouped_linear(rows: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``rows[r] @ weight[e]^T + bias[e]`` with e the expert that owns row r; empty rows are 0.

    Args:
        rows: [R, I], expert-sorted as by ``permute``.
        weight: [E, O, I], of rows' type; or packed by ``pack_weight``, with the same result bit for bit and no
            derivative.
        bias: [E, O] or None.
        offsets: [E+1] int32, ``Plan.offsets``.

    Returns:
        [R, O].

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("rows", rows, ("R", "I"), checks.FLOATING, rows)
    checks.same_dtype("rows", rows, weight=weight, bias=bias)
    is_packed = isinstance(weight, PackedWeight)
    shape = ("E", "O", rows.shape[1])
    if is_packed:
        checks.packed("weight", weight, shape, rows)
    else:
        checks.tensor("weight", weight, shape, checks.FLOATING, rows)
    checks.optional("bias", bias, tuple(weight.shape[:2]), checks.FLOATING, rows)
    checks.tensor("offsets", offsets, (weight.shape[0] + 1,), (torch.int32,), rows)
    if is_packed:
        checks.no_gradient(rows, bias)
        if weight.layout != PLAIN_LAYOUT:
            return _packed_grouped_linear(rows, weight.block, bias, offsets, weight.shape[1], weight.layout)
        weight = weight.block
    return _grouped_linear(rows, weight, bias, offsets)


# ---------------------------------------------------------------- combine


def _combine_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _combine_backward_of(ctx, dy):
    return (*_combine_backward(dy, *ctx.saved_tensors), None, None, None)


_combine = define(
    "combine(Tensor rows, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice) -> Tensor",
    setup_context=_combine_context,
    backward=_combine_backward_of,
)
_combine_backward = define(
    "combine_backward(Tensor dy, Tensor rows, Tensor gates, Tensor offsets, Tensor choice_of_row,"
    " Tensor row_of_choice) -> (Tensor, Tensor)",
)


def combine(rows: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """``y[t] = sum_k gates[t, k] * rows[row_of_choice[t, k]]``, summed in float32 in the order of k.

    Args:
        rows: [R, D] in expert order.
        gates: [T, K] float32.
        plan: from ``dispatch``; dropped choices add nothing.

    Returns:
        [T, D] of rows' type.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("rows", rows, ("R", "D"), checks.FLOATING, rows)
    checks.gates(gates, rows)
    checks.plan(plan, gates.shape[0], rows)
    checks.tensor("gates", gates, tuple(plan.row_of_choice.shape), (gates.dtype,), rows)
    checks.tensor("rows", rows, (plan.choice_of_row.shape[0], "D"), (rows.dtype,), rows)
    return _combine(rows, gates, *plan)
