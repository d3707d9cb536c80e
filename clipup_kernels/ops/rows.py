"""Ops on rows in expert order: permute, grouped_linear and combine, the parts of ``expert_mlp``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..types import PLAIN_LAYOUT, PackedWeight, Plan
from .register import define, save_inputs


def _permute_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[3])


def _permute_gradients(ctx, needs, d_rows):
    return {"x": _gather_sum(d_rows, *ctx.saved_tensors)}


_permute = define(
    "permute(Tensor x, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice) -> Tensor",
    setup_context=_permute_context,
    backward=_permute_gradients,
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


def _grouped_linear_context(ctx, inputs, output):
    rows, weight, _, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)


def _grouped_linear_gradients(ctx, needs, d_out):
    names = ("rows", "weight", "bias")
    grads = _grouped_linear_backward(d_out, *ctx.saved_tensors, [needs[name] for name in names])
    return dict(zip(names, grads, strict=True))


_grouped_linear = define(
    "grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    setup_context=_grouped_linear_context,
    backward=_grouped_linear_gradients,
    flops=lambda arguments: 2 * arguments["rows"][0] * math.prod(arguments["weight"][1:]),
)


_grouped_linear_backward = define(
    "grouped_linear_backward(Tensor d_out, Tensor rows, Tensor weight, Tensor offsets, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    flops=lambda arguments: (
        2 * arguments["rows"][0] * math.prod(arguments["weight"][1:]) * sum(arguments["output_mask"][:2])
    ),
)


_packed_grouped_linear = define(
    "packed_grouped_linear(Tensor rows, Tensor packed, Tensor? bias, Tensor offsets, int out_features, str layout)"
    " -> Tensor",
    flops=lambda arguments: 2 * math.prod(arguments["rows"]) * arguments["out_features"],
    packed=True,
)


def grouped_linear(rows: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``rows[r] @ weight[e]^T + bias[e]`` with e the expert of row r; empty rows are 0.

    Args:
        rows: [R, I], expert-sorted as by ``permute``.
        weight: [E, O, I], of rows' type; or packed by ``pack_weight``, with bitwise the same result unless it is
            quantized, and no derivative.
        bias: [E, O] or None.
        offsets: [E+1] int32, ``Plan.offsets``.

    Returns:
        [R, O].

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("rows", rows, ("R", "I"), checks.FLOATING, rows)
    is_packed = isinstance(weight, PackedWeight)
    shape = ("E", "O", rows.shape[1])
    if is_packed:
        checks.packed("weight", weight, shape, rows)
    else:
        checks.tensor("weight", weight, shape, checks.FLOATING, rows)
    checks.optional("bias", bias, tuple(weight.shape[:2]), checks.FLOATING, rows)
    checks.same_dtype("rows", rows, weight=weight, bias=bias)
    checks.tensor("offsets", offsets, (weight.shape[0] + 1,), (torch.int32,), rows)
    if is_packed:
        checks.no_gradient(rows, bias)
        if weight.layout != PLAIN_LAYOUT:
            return _packed_grouped_linear(rows, weight.block, bias, offsets, weight.shape[1], weight.layout)
        weight = weight.block
    return _grouped_linear(rows, weight, bias, offsets)


def _combine_gradients(ctx, needs, dy):
    d_rows, d_gates = _combine_backward(dy, *ctx.saved_tensors)
    return {"rows": d_rows, "gates": d_gates}


_combine = define(
    "combine(Tensor rows, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice) -> Tensor",
    setup_context=save_inputs,
    backward=_combine_gradients,
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
    checks.plan(plan, "T", rows)
    checks.gates(gates, rows, tuple(plan.row_of_choice.shape))
    checks.tensor("rows", rows, (plan.choice_of_row.shape[0], "D"), (rows.dtype,), rows)
    return _combine(rows, gates, *plan)
