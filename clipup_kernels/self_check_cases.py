"""The cases of the self-check: arguments of every op, at the sizes for each device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import registry, torch_eager
from .types import ACTIVATIONS, Plan


class Size(NamedTuple):
    """The size of a layer, and the ops that are checked at it. On CUDA devices most of the time is compiling."""

    tokens: int
    width: int
    hidden: int
    num_experts: int
    k: int
    products_alone: bool = False
    """Only the ops that multiply."""
    forms: tuple[str, ...] = ("plain",)
    """Of experts: "plain" with biases and GELU, "gated" with biases and SiLU, "gated without biases" with QuickGELU,
    "activations": plain with each of the other activations."""


SIZES = {
    "cpu": (
        Size(37, 19, 53, 5, 3, forms=("plain", "gated", "gated without biases", "activations")),
        Size(330, 64, 96, 4, 2, forms=("plain", "gated")),
    ),
    "cuda": (
        Size(37, 19, 53, 5, 3, forms=("plain", "gated", "gated without biases")),
        Size(64, 256, 256, 16, 2),
        Size(400, 256, 256, 4, 2, products_alone=True),
        Size(
            *(1600, 256, 256, 4, 2),
            products_alone=True,
            forms=("plain", "gated", "gated without biases", "activations"),
        ),
    ),
}
"""By device type: odd widths, and widths and rows for several full tiles. On CUDA devices a size for each class of rows
per expert, with the tiles of layers of usual widths (``clipup_kernels.triton.configs``)."""


def wide(arguments: tuple) -> list[Any]:
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)


def map_tensors(change: Any, arguments: tuple) -> list[Any]:
    return [change(item) if isinstance(item, Tensor) else item for item in arguments]


def cases_of_ops(dtype: torch.dtype, all_sizes: Iterable[Size]) -> dict[tuple[str, torch.dtype], list[tuple]]:
    """Arguments of every op, on the CPU: with and without gates, biases, masks and a capacity. By op and the type of
    its first argument, by which the registry chooses."""
    cases: dict[tuple[str, torch.dtype], list[tuple]] = {}
    for seed, size in enumerate(all_sizes):
        for op, arguments in _cases_of_size(dtype, size, torch.Generator("cpu").manual_seed(seed)):
            if op in registry.PRODUCTS or not size.products_alone:
                cases.setdefault((op, arguments[0].dtype), []).append(arguments)
    return cases


def _cases_of_size(dtype: torch.dtype, sizes: Size, generator: torch.Generator) -> Iterator[tuple[str, tuple]]:
    tokens, width, hidden, num_experts, k = sizes[:5]

    def randn(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    full = torch.float32
    x, dy, router = randn(tokens, width), randn(tokens, width), randn(num_experts, width, dtype=full)
    mask = torch.rand(tokens, generator=generator) < 0.8
    logits, d_logits = randn(tokens, num_experts, dtype=full), randn(tokens, num_experts, dtype=full)
    for tokens_of_router in [x] if dtype == full else [x, x.float()]:  # under autocast a router may get float32
        for used in (None, mask):
            yield "router_logits", (tokens_of_router, router, used)
            yield "router_logits_backward", (d_logits, tokens_of_router, router, used, [True, True])
    bias = randn(num_experts, dtype=full, scale=0.1)
    gating = reference.topk_gating(logits, k, True, bias, mask)
    gradients = (randn(tokens, k, dtype=full), randn(tokens, dtype=full), randn(num_experts, dtype=full))
    yield "topk_gating", (logits, k, True, bias, mask)
    yield "topk_gating", (logits, k, False, None, None)
    yield "topk_gating_backward", (logits, gating.expert_indices, True, mask, *gradients, randn(1, dtype=full)[0])
    yield "dispatch", (gating.expert_indices, num_experts, None, None, None)
    yield "dispatch", (gating.expert_indices, num_experts, 0.8, gating.top_prob, mask)
    plan: Plan = reference.dispatch(gating.expert_indices, num_experts, 0.8, gating.top_prob, mask)
    rows = randn(tokens * k, width)
    yield "permute", (x, *plan)
    yield "gather_sum", (rows, plan.row_of_choice)
    yield "combine", (rows, gating.gates, *plan)
    yield "combine_backward", (dy, rows, gating.gates, *plan)
    scale = width**-0.5
    in_weight, gate_weight = (randn(num_experts, hidden, width, scale=scale) for _ in range(2))
    in_bias, gate_bias = (randn(num_experts, hidden) for _ in range(2))
    out_weight, out_bias = randn(num_experts, width, hidden, scale=hidden**-0.5), randn(num_experts, width)
    yield "grouped_linear", (rows, in_weight, in_bias, plan.offsets)
    d_out = randn(tokens * k, hidden)
    yield "grouped_linear_backward", (d_out, rows, in_weight, plan.offsets, [True] * 3)
    plain = (in_weight, in_bias, out_weight, out_bias, None, None)
    forms: dict[str, list[tuple[tuple, str]]] = {
        "plain": [(plain, "gelu")],
        "gated": [((in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias), "silu")],
        "gated without biases": [((in_weight, None, out_weight, None, gate_weight, None), "quick_gelu")],
        "activations": [(plain, activation) for activation in ACTIVATIONS if activation != "gelu"],
    }
    for parameters, activation in itertools.chain(*(forms[form] for form in sizes.forms)):
        routed = (x, gating.gates, *plan, *parameters)
        _, z = torch_eager.expert_mlp_forward(*wide((*routed, activation, True)))
        yield "expert_mlp_forward", (*routed, activation, True)
        yield "expert_mlp_forward", (*routed, activation, False)
        yield "expert_mlp_backward", (dy, *routed, z.to(dtype), activation, [True] * 4)
        if parameters[1] is None and parameters[4] is not None:
            halves = (torch.cat((gate_weight, in_weight), dim=1), out_weight)
            yield "expert_glu_forward", (*routed[:-6], *halves, activation, True)
            yield "expert_glu_backward", (dy, *routed[:-6], *halves, z.to(dtype), activation, [True] * 4)
        one = [None if weight is None else weight[0].contiguous() for weight in parameters]
        yield "dense_mlp", (x, *one, activation)
    heads = 2
    qkv = randn(3, tokens // 3, 3 * heads * width)
    seen = torch.full((1, 1, tokens // 3, tokens // 3), float("-inf"), device=x.device).triu(1)
    yield "self_attention", (qkv, None, heads, None)
    yield "self_attention", (qkv, seen, heads, None)
    if len(sizes.forms) > 1:
        routed = (x, gating.gates, *plan, *plain)
        yield "expert_mlp_backward", (dy, *routed, x.new_empty(0), "gelu", [True] * 4)
        yield "expert_mlp_backward", (dy, *routed, x.new_empty(0), "gelu", [True, False, False, True])
