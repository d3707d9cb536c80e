"""``expert_mlp`` and ``dense_mlp``: checks, registration, and the tensors saved for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..types import PLAIN_LAYOUT, PackedWeight, Plan
from .register import define


def _context(ctx, inputs, output):
    *tensors, activation, _ = inputs
    _, z = output
    ctx.save_for_backward(*tensors, z)
    ctx.activation = activation
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)


_DIFFERENTIATED = ("x", "gates", "in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias")
_GLU_DIFFERENTIATED = ("x", "gates", "gate_in_weight", "out_weight")


def _gradients(ctx, needs, dy, dz):
    if dy is None:
        return {}
    *tensors, z = ctx.saved_tensors
    need_in = any(needs[name] for name in ("in_weight", "in_bias", "gate_weight", "gate_bias"))
    output_mask = [needs["x"], needs["gates"], need_in, needs["out_weight"] or needs["out_bias"]]
    grads = _expert_mlp_backward(dy, *tensors, z, ctx.activation, output_mask)
    return dict(zip(_DIFFERENTIATED, grads, strict=True))


def _glu_gradients(ctx, needs, dy, dz):
    if dy is None:
        return {}
    *tensors, z = ctx.saved_tensors
    output_mask = [needs[name] for name in _GLU_DIFFERENTIATED]
    grads = _expert_glu_backward(dy, *tensors, z, ctx.activation, output_mask)
    return dict(zip(_GLU_DIFFERENTIATED, grads, strict=True))


def _product_flops(arguments: dict[str, Any]) -> tuple[int, int]:
    """The FLOPs of the product of all rows with one matrix, and how many matrices lead into the hidden width."""
    rows = arguments.get("choice_of_row", arguments["x"])[0]
    hidden = arguments["hidden"] if "hidden" in arguments else arguments["out_weight"][-1]
    gates = [arguments[name] for name in ("gate_weight", "gate_in_weight", "gate_packed") if name in arguments]
    return 2 * rows * hidden * arguments["x"][1], 1 if gates == [None] else 2


def _forward_flops(arguments: dict[str, Any]) -> int:
    product, in_products = _product_flops(arguments)
    return product * (in_products + 1)


def _backward_flops(arguments: dict[str, Any]) -> int:
    product, in_products = _product_flops(arguments)
    need_x, _, need_in, need_out = arguments["output_mask"]
    recomputed = 0 in arguments["z"]
    return product * (1 + need_out + in_products * (need_x + need_in + recomputed))


_expert_mlp_forward = define(
    "expert_mlp_forward(Tensor x, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice,"
    " Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, Tensor? gate_weight, Tensor? gate_bias,"
    " str activation, bool keep_z) -> (Tensor, Tensor)",
    setup_context=_context,
    backward=_gradients,
    flops=_forward_flops,
)
_expert_mlp_backward = define(
    "expert_mlp_backward(Tensor dy, Tensor x, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice,"
    " Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, Tensor? gate_weight, Tensor? gate_bias,"
    " Tensor z, str activation, bool[4] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    flops=_backward_flops,
)
_expert_glu_forward = define(
    "expert_glu_forward(Tensor x, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice,"
    " Tensor gate_in_weight, Tensor out_weight, str activation, bool keep_z) -> (Tensor, Tensor)",
    setup_context=_context,
    backward=_glu_gradients,
    flops=_forward_flops,
)
_expert_glu_backward = define(
    "expert_glu_backward(Tensor dy, Tensor x, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice,"
    " Tensor gate_in_weight, Tensor out_weight, Tensor z, str activation, bool[4] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    flops=_backward_flops,
)
_dense_mlp = define(
    "dense_mlp(Tensor x, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, Tensor? gate_weight,"
    " Tensor? gate_bias, str activation) -> Tensor",
    flops=_forward_flops,
)
_packed_expert_mlp = define(
    "packed_expert_mlp(Tensor x, Tensor gates, Tensor offsets, Tensor choice_of_row, Tensor row_of_choice,"
    " Tensor in_packed, Tensor? in_bias, Tensor out_packed, Tensor? out_bias, Tensor? gate_packed, Tensor? gate_bias,"
    " int hidden, str activation, str layout) -> Tensor",
    flops=_forward_flops,
    packed=True,
)
_packed_dense_mlp = define(
    "packed_dense_mlp(Tensor x, Tensor in_packed, Tensor? in_bias, Tensor out_packed, Tensor? out_bias,"
    " Tensor? gate_packed, Tensor? gate_bias, int hidden, str activation, str layout) -> Tensor",
    flops=_forward_flops,
    packed=True,
)


def _check_weights(x: Tensor, parameters: dict[str, Any], activation: str, lead: tuple[str, ...]) -> None:
    """x [T, D] and the weights of MLPs, with ``lead`` before [H, D] and [D, H]: ("E",) for experts, () for one MLP."""
    checks.tensor("x", x, ("T", "D"), checks.FLOATING, x)
    width = x.shape[1]
    matrix = checks.packed if _any_packed(parameters) else _check_plain
    matrix("in_weight", parameters["in_weight"], (*lead, "H", width), x)
    *experts, hidden, _ = parameters["in_weight"].shape
    matrix("out_weight", parameters["out_weight"], (*experts, width, hidden), x)
    inside, outside = (*experts, hidden), (*experts, width)
    if parameters["gate_weight"] is not None:
        matrix("gate_weight", parameters["gate_weight"], (*inside, width), x)
    for name, shape in {"in_bias": inside, "out_bias": outside, "gate_bias": inside}.items():
        checks.optional(name, parameters[name], shape, checks.FLOATING, x)
    checks.same_dtype("x", x, **parameters)
    if parameters["gate_bias"] is not None and parameters["gate_weight"] is None:
        raise ValueError("gate_bias was given without gate_weight; give both for a gated MLP, or neither")
    checks.activation(activation)


def _check_plain(name: str, value: Any, shape: tuple[int | str, ...], x: Tensor) -> None:
    checks.tensor(name, value, shape, checks.FLOATING, x)


def _any_packed(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, PackedWeight) for value in parameters.values())


def _operands(parameters: dict[str, Any], *others: Tensor) -> tuple[list[Any], int, str]:
    """The tensors of packed weights and of the biases beside them, in the order of ``parameters``; H; the layout."""
    packed = parameters["in_weight"]
    for name, value in parameters.items():
        if isinstance(value, PackedWeight) and value.layout != packed.layout:
            raise ValueError(
                f"{name} is packed as {value.layout} and in_weight as {packed.layout}; pack both in this process"
            )
    tensors = [value.block if isinstance(value, PackedWeight) else value for value in parameters.values()]
    checks.no_gradient(*others, *tensors)
    return tensors, packed.shape[-2], packed.layout


def expert_mlp(
    x: Tensor,
    gates: Tensor,
    plan: Plan,
    in_weight: Tensor | PackedWeight,
    in_bias: Tensor | None,
    out_weight: Tensor | PackedWeight,
    out_bias: Tensor | None,
    activation: str = "gelu",
    gate_weight: Tensor | PackedWeight | None = None,
    gate_bias: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Applies the experts' MLPs to their tokens in ``plan``, and sums the results per token, weighted by ``gates``.

    ``z = W_in x + b_in``, ``a = act(z)`` (gated: ``a = act(W_gate x + b_gate) * z``), and
    ``y = sum_k g_k (W_out a + b_out)``.
    Besides its arguments, only z is saved for backward ([R, H]; gated: both pre-activations).

    Args:
        x: [T, D] float32, bfloat16, float16 or float64; all weights and biases have its type.
        gates: [T, K] float32; float64 where x is.
        plan: from ``dispatch``; y is 0 for tokens without a row.
        in_weight: [E, H, D]. in_bias: [E, H] or None. out_weight: [E, D, H]. out_bias: [E, D] or None.
        activation: one of ``ACTIVATIONS``.
        gate_weight: [E, H, D] for gated experts. gate_bias: [E, H] or None.
        recompute: "none" keeps z for backward; "full" keeps only x and recomputes z.

    All weights (not the biases) may be packed by ``pack_weight``: bitwise the same result unless they are quantized,
    faster, no derivative.

    Returns:
        [T, D] of x's type. Sums are in float32, of float64 in float64.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: on a second derivative, and on any derivative of packed weights.
    """
    parameters = dict(
        in_weight=in_weight, in_bias=in_bias, out_weight=out_weight, out_bias=out_bias, gate_weight=gate_weight,
        gate_bias=gate_bias,
    )  # fmt: skip
    _check_weights(x, parameters, activation, ("E",))
    checks.routed(x, gates, plan, in_weight.shape[0], recompute)
    tensors = list(parameters.values())
    if _any_packed(parameters):
        tensors, hidden, layout = _operands(parameters, x, gates)
        if layout != PLAIN_LAYOUT:
            return _packed_expert_mlp(x, gates, *plan, *tensors, hidden, activation, layout)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gates, *tensors))
    y, _ = _expert_mlp_forward(x, gates, *plan, *tensors, activation, differentiated and recompute == "none")
    return y


def expert_glu(
    x: Tensor,
    gates: Tensor,
    plan: Plan,
    gate_in_weight: Tensor,
    out_weight: Tensor,
    activation: str = "silu",
    recompute: str = "none",
) -> Tensor:
    """``expert_mlp`` for gated experts without biases, whose first two matrices are one weight, as in transformers.

    ``y = sum_k g_k W_out (act(W_gate x) * (W_in x))``. Both halves of the weight are read in place; on CPUs their
    gradients are written in place too.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64; both weights have its type.
        gates: [T, K] float32; float64 where x is.
        plan: from ``dispatch``; y is 0 for tokens without a row.
        gate_in_weight: [E, 2H, D]: W_gate in the first H rows, W_in in the others. out_weight: [E, D, H].
        activation: one of ``ACTIVATIONS``.
        recompute: as in ``expert_mlp``.

    Returns:
        [T, D] of x's type. Sums are in float32.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: on a second derivative.
    """
    checks.tensor("x", x, ("T", "D"), checks.FLOATING, x)
    checks.tensor("out_weight", out_weight, ("E", x.shape[1], "H"), checks.FLOATING, x)
    num_experts, width, hidden = out_weight.shape
    checks.tensor("gate_in_weight", gate_in_weight, (num_experts, 2 * hidden, width), checks.FLOATING, x)
    checks.same_dtype("x", x, gate_in_weight=gate_in_weight, out_weight=out_weight)
    checks.activation(activation)
    checks.routed(x, gates, plan, num_experts, recompute)
    tensors = (x, gates, gate_in_weight, out_weight)
    keep = recompute == "none" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y, _ = _expert_glu_forward(x, gates, *plan, gate_in_weight, out_weight, activation, keep)
    return y


def dense_mlp(
    x: Tensor,
    in_weight: Tensor | PackedWeight,
    in_bias: Tensor | None,
    out_weight: Tensor | PackedWeight,
    out_bias: Tensor | None,
    activation: str = "gelu",
    gate_weight: Tensor | PackedWeight | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """One MLP for all tokens, for inference: ``expert_mlp`` with one expert and no routing.

    ``y = W_out act(W_in x + b_in) + b_out``, gated: ``act(W_gate x + b_gate) * (W_in x + b_in)`` in the middle. It runs
    on the expert kernels on CPUs and in plain torch elsewhere. It has no derivative.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64; all weights and biases have its type.
        in_weight: [H, D]. in_bias: [H] or None. out_weight: [D, H]. out_bias: [D] or None.
        activation: one of ``ACTIVATIONS``.
        gate_weight: [H, D] for a gated MLP. gate_bias: [H] or None.

    All weights (not the biases) may be packed by ``pack_weight``: bitwise the same result unless they are quantized,
    faster.

    Returns:
        [T, D] of x's type.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: if it is differentiated.
    """
    parameters = dict(
        in_weight=in_weight, in_bias=in_bias, out_weight=out_weight, out_bias=out_bias, gate_weight=gate_weight,
        gate_bias=gate_bias,
    )  # fmt: skip
    _check_weights(x, parameters, activation, ())
    tensors = list(parameters.values())
    if _any_packed(parameters):
        tensors, hidden, layout = _operands(parameters, x)
        if layout != PLAIN_LAYOUT:
            return _packed_dense_mlp(x, *tensors, hidden, activation, layout)
    return _dense_mlp(x, *tensors, activation)
