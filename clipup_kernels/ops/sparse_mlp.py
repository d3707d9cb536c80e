"""``packed_sparse_mlp``: router and experts in one op, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import registry
from ..types import PLAIN_LAYOUT, PackedWeight, RoutingBlocks
from .register import define


def _flops(arguments: dict[str, Any]) -> int:
    num_tokens, width = arguments["x"]
    products = 2 if arguments["gate_packed"] is None else 3
    columns = arguments["router_weight"][0] + products * arguments["k"] * arguments["hidden"]
    return 2 * num_tokens * width * columns


_packed_sparse_mlp = define(
    "packed_sparse_mlp(Tensor x, Tensor router_weight, Tensor? selection_bias, Tensor? mask, int k, bool renormalize,"
    " float? capacity_factor, bool by_priority, float gate_scale, Tensor in_packed, Tensor? in_bias, Tensor out_packed,"
    " Tensor? out_bias, Tensor? gate_packed, Tensor? gate_bias, int hidden, str activation, str layout)"
    " -> (Tensor, Tensor, Tensor)",
    flops=_flops,
    packed=True,
)


_PARTS = ("router_logits", "topk_gating", "dispatch", "packed_expert_mlp")


def is_one_op(packed: PackedWeight) -> bool:
    """Whether the kernels of ``packed_sparse_mlp`` are those of the single ops, for tokens of the weight's type."""
    return packed.layout != PLAIN_LAYOUT and registry.all_computed_by("cpp", _PARTS, packed.dtype)


def packed_sparse_mlp(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    in_weight: PackedWeight,
    in_bias: Tensor | None,
    out_weight: PackedWeight,
    out_bias: Tensor | None,
    activation: str = "gelu",
    gate_weight: PackedWeight | None = None,
    gate_bias: Tensor | None = None,
    *,
    renormalize: bool = True,
    capacity_factor: float | None = None,
    by_priority: bool = False,
    gate_scale: float = 1.0,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, RoutingBlocks]:
    """``router_logits``, ``topk_gating``, ``dispatch`` and ``expert_mlp``: a sparse layer as one op, with bitwise their
    results. For few tokens, the calls take longer than what they compute.

    Args:
        x: [T, D] float32, bfloat16 or float16, the type of the experts.
        router_weight: [E, D] float32.
        k: choices per token, 1 <= k <= E.
        in_weight, in_bias, out_weight, out_bias, activation, gate_weight, gate_bias: as in ``expert_mlp``; packed, and
            such that ``is_one_op`` holds.
        renormalize, selection_bias: as in ``topk_gating``.
        capacity_factor: as in ``dispatch``.
        by_priority: tokens are served in the order of their largest router probability (``dispatch``'s ``priority``).
        gate_scale: ``y = sum_k gate_scale * g_k * expert_k(x)``.
        mask: [T] bool, False for masked tokens, whose y is 0.

    Returns:
        y [T, D] of x's type, and the routing.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: if it is differentiated.
    """
    num_experts, hidden, width = in_weight.shape
    for name, packed in (("in_weight", in_weight), ("out_weight", out_weight), ("gate_weight", gate_weight)):
        if packed is not None and not (x.is_cpu and packed.block.is_cpu):
            checks.packed(name, packed, packed.shape, x)  # says which is where
    _check("x", x, (x.shape[0], width), in_weight.dtype, x)
    _check("router_weight", router_weight, (num_experts, width), torch.float32, x)
    _check("selection_bias", selection_bias, (num_experts,), torch.float32, x)
    _check("mask", mask, (x.shape[0],), torch.bool, x)
    _check("in_bias", in_bias, (num_experts, hidden), x.dtype, x)
    _check("out_bias", out_bias, (num_experts, width), x.dtype, x)
    _check("gate_bias", gate_bias, (num_experts, hidden), x.dtype, x)
    checks.no_gradient(x, router_weight, in_bias, out_bias, gate_bias)
    y, floats, ints = _packed_sparse_mlp(
        x, router_weight, selection_bias, mask, k, renormalize, capacity_factor, by_priority, gate_scale,
        in_weight.block, in_bias, out_weight.block, out_bias, None if gate_weight is None else gate_weight.block,
        gate_bias, hidden, activation, in_weight.layout,
    )  # fmt: skip
    return y, RoutingBlocks(floats, ints, x.shape[0], num_experts, k)


def _check(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """``checks.tensor``, which takes longer, only for arguments that it refuses."""
    if value is None:
        return
    if value.shape != shape or value.dtype != dtype or not value.is_cpu or value.layout != torch.strided:
        checks.tensor(name, value, shape, (dtype,), x)
