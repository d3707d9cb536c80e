"""Named shapes and fresh random inputs for the tests of the ops, and how closely each dtype must follow the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import clipup_kernels as ck

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}
"""Largest error allowed, relative to the largest entry of the float64 oracle's answer."""


class Shape(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int


SHAPES = {
    "plain": Shape(96, 32, 64, 8, 2),
    "odd": Shape(37, 19, 53, 5, 3),
    "one_token": Shape(1, 16, 24, 4, 2),
    "no_token": Shape(0, 16, 24, 4, 2),
    "one_expert": Shape(33, 16, 24, 1, 1),
    "all_experts": Shape(21, 16, 24, 4, 4),
    "more_experts_than_rows": Shape(3, 16, 24, 64, 2),
}


def pairwise(**axes: Iterable) -> list[dict[str, Any]]:
    """Cases, one value of every axis, in which any two values of two axes meet: a covering array, chosen greedily."""
    cases = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    random.Random(0).shuffle(cases)
    pairs = [set(itertools.combinations(case.items(), 2)) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.append(cases[best])
        missing -= pairs[best]
    return chosen


def covering(**axes: Iterable) -> list:
    """Every case of the grid as a parameter of a test; those outside of ``pairwise`` are marked slow."""
    axes = {name: tuple(values) for name, values in axes.items()}
    usual = pairwise(**axes)
    return [
        pytest.param(case, marks=[] if case in usual else pytest.mark.slow, id="-".join(map(str, case.values())))
        for case in (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    ]


ROUTINGS = ("dropless", "capacity", "priority", "masked", "all_masked", "all_dropped", "one_expert_takes_all")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64).to(dtype)


def route(shape: Shape, routing: str = "dropless", seed: int = 0) -> tuple[Tensor, ck.Plan]:
    """Gates [T, K] float32 and a plan made by the oracle."""
    logits = randn(shape.tokens, shape.experts, seed=seed)
    if routing == "one_expert_takes_all":
        logits[:, 0] += 100
    mask = None
    if routing == "masked":
        mask = torch.rand(shape.tokens, generator=seeded(seed + 1)) < 0.6
    if routing == "all_masked":
        mask = torch.zeros(shape.tokens, dtype=torch.bool)
    gating = ck.reference.topk_gating(logits, shape.k, renormalize=True, mask=mask)
    factor = {"capacity": 0.6, "priority": 0.6, "all_dropped": None}.get(routing)
    priority = gating.top_prob if routing == "priority" else None
    plan = ck.reference.dispatch(gating.expert_indices, shape.experts, factor, priority, mask)
    if routing == "all_dropped":
        plan = ck.Plan(*(torch.zeros_like(plan.offsets), *(torch.full_like(p, -1) for p in plan[1:])))
    return gating.gates, plan


class Experts(NamedTuple):
    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    activation: str
    gate_weight: Tensor | None
    gate_bias: Tensor | None


def make_experts(
    shape: Shape, dtype=torch.float32, activation="gelu", bias=True, gated=False, seed: int = 0
) -> Experts:
    _, d, h, e, _ = shape

    def weight(*size, seed):
        return (randn(*size, seed=seed) / size[-1] ** 0.5).to(dtype)

    return Experts(
        in_weight=weight(e, h, d, seed=seed + 1),
        in_bias=randn(e, h, dtype=dtype, seed=seed + 2) if bias else None,
        out_weight=weight(e, d, h, seed=seed + 3),
        out_bias=randn(e, d, dtype=dtype, seed=seed + 4) if bias else None,
        activation=activation,
        gate_weight=weight(e, h, d, seed=seed + 5) if gated else None,
        gate_bias=randn(e, h, dtype=dtype, seed=seed + 6) if gated and bias else None,
    )


def double(value):
    """The same arguments in float64 (tensors of indices stay as they are)."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def assert_follows(actual: Tensor, oracle: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """``actual`` follows the float64 ``oracle`` as closely as ``dtype`` allows."""
    assert actual.shape == oracle.shape, f"{what}: shape {list(actual.shape)} instead of {list(oracle.shape)}"
    assert actual.isfinite().all(), f"{what} is not finite"
    if oracle.numel() == 0:
        return
    scale = oracle.abs().max().item() or 1.0
    error = (actual.double() - oracle).abs().max().item() / scale
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.2e} of the largest entry, allowed {TOLERANCE[dtype]:.0e}"


def with_grad(value):
    """Leaves that require grad for every floating tensor in a tuple."""
    return type(value)(
        *(
            item.detach().clone().requires_grad_() if isinstance(item, Tensor) and item.is_floating_point() else item
            for item in value
        )
    )


def outputs_and_gradients(mlp, x, gates, plan, experts: Experts, dy, **kwargs) -> dict[str, Tensor]:
    """y and the gradient of every floating argument."""
    x, gates = x.detach().clone().requires_grad_(), gates.detach().clone().requires_grad_()
    experts = with_grad(experts)
    y = mlp(x, gates, plan, *experts, **kwargs)
    leaves = {"x": x, "gates": gates} | {n: t for n, t in experts._asdict().items() if isinstance(t, Tensor)}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
