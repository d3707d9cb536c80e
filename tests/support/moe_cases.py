"""Named shapes and fresh random inputs for the tests of the ops, and how closely each dtype must follow the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


def usual(**axes: Iterable) -> list:
    """The cases of ``pairwise`` as parameters of a test."""
    return [pytest.param(case, id="-".join(map(str, case.values()))) for case in pairwise(**axes)]


def calls_of(make: Callable[..., Case | list[Case]], *cases: Any) -> list:
    """Parameters of a test: a function that makes calls of ops, and the keywords of each case."""
    return [pytest.param(make, *case.values, marks=case.marks, id=f"{make.__name__}-{case.id}") for case in cases]


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
    mask = masked_out(shape.tokens, {"masked": 0.4, "all_masked": 1.0}.get(routing))
    gating = ck.reference.topk_gating(logits, shape.k, renormalize=True, mask=mask)
    factor = 0.6 if routing in ("capacity", "priority") else None
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
    return tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, value)


def assert_follows(actual: Tensor, oracle: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """``actual`` follows the float64 ``oracle`` as closely as ``dtype`` allows."""
    assert actual.shape == oracle.shape, f"{what}: shape {list(actual.shape)} instead of {list(oracle.shape)}"
    assert actual.isfinite().all(), f"{what} is not finite"
    if oracle.numel() == 0:
        return
    scale = oracle.abs().max().item() or 1.0
    error = (actual.double() - oracle).abs().max().item() / scale
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.2e} of the largest entry, allowed {TOLERANCE[dtype]:.0e}"


class Case(NamedTuple):
    """A call of an op. What the op must not read holds NaN."""

    op: str
    arguments: dict[str, Any]
    dtype: torch.dtype = torch.float32
    """Of the tokens, and of the gradients that come in."""
    unread: Tensor | None = None
    """[N] bool: the rows of the first output whose gradient must not be read."""


ROUTERS = {
    "usual": (50, 160, 8),
    "one_token": (1, 64, 8),
    "no_token": (0, 32, 4),
    "one_expert": (9, 7, 1),
    "odd": (33, 45, 41),
    "wide": (21, 300, 5),
}
"""T, D and E."""
GATINGS = {
    "plain": dict(tokens=150, experts=8, k=2),
    "raw_gates": dict(tokens=70, experts=8, k=2, renormalize=False),
    "one_choice": dict(tokens=33, experts=5, k=1, renormalize=False),
    "every_expert": dict(tokens=9, experts=4, k=4),
    "one_expert": dict(tokens=9, experts=1, k=1),
    "one_token": dict(tokens=1, experts=8, k=2),
    "many_experts": dict(tokens=50, experts=200, k=7),
    "masked": dict(tokens=140, experts=8, k=2, masked=0.5),
    "masked_raw": dict(tokens=40, experts=6, k=3, renormalize=False, masked=0.5),
    "all_masked": dict(tokens=7, experts=8, k=2, masked=1.0),
    "no_tokens": dict(tokens=0, experts=8, k=2),
    "biased_choice": dict(tokens=70, experts=8, k=3, biased=0.3),
    "choice_of_no_probability": dict(tokens=40, experts=8, k=2, biased=10.0, scale=60.0),
    "large_logits": dict(tokens=40, experts=8, k=2, scale=60.0),
}


def masked_out(tokens: int, share: float | None) -> Tensor | None:
    return None if not share else torch.rand(tokens, generator=seeded(3)) >= share


def router_case(size, dtype=torch.float32, masked=None) -> Case:
    tokens, width, experts = ROUTERS.get(size, size)
    x, mask = randn(tokens, width, dtype=dtype, seed=tokens), masked_out(tokens, masked)
    if mask is not None:
        x[~mask] = torch.nan
    arguments = dict(x=x, weight=randn(experts, width, dtype=torch.promote_types(dtype, torch.float32)), mask=mask)
    return Case("router_logits", arguments, dtype, None if mask is None else ~mask)


def gating_case(tokens, experts, k, renormalize=True, masked=None, biased=0.0, scale=1.0, seed=0, **other) -> Case:
    dtype, mask = other.get("dtype", torch.float32), masked_out(tokens, masked)
    logits = scale * randn(tokens, experts, dtype=dtype, seed=seed)
    if mask is not None:
        logits[~mask] = torch.nan
    bias = biased * randn(experts, dtype=dtype, seed=seed + 1) if biased else None
    arguments = dict(logits=logits, k=k, renormalize=renormalize, selection_bias=bias, mask=mask)
    return Case("topk_gating", arguments, dtype)


def plan_case(tokens, experts, k, factor=None, prioritised=False, masked=None, seed=0) -> Case:
    """Coarse priorities, so that ties are common; NaN goes last, and zeros of both signs tie."""
    chosen = torch.rand(tokens, experts, generator=seeded(seed)).argsort(1)[:, : min(k, experts)].int()
    coarse = torch.tensor([0.0, -0.0, 2.0, 3.0, 4.0, torch.nan])
    priority = coarse[(torch.rand(tokens, generator=seeded(seed)) * 5).round().long()] if prioritised else None
    arguments = dict(expert_indices=chosen, num_experts=experts, capacity_factor=factor, priority=priority)
    return Case("dispatch", arguments | {"mask": masked_out(tokens, masked)})


def rows_cases(shape, routing, dtype=torch.float32, bias=True, seed=0) -> list[Case]:
    """``permute``, ``combine`` and ``grouped_linear``."""
    shape = SHAPES.get(shape, shape)
    gates, plan = route(shape, routing, seed)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 1)
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=seed + 2)
    gates, nowhere = torch.where(plan.row_of_choice < 0, torch.nan, gates), (plan.row_of_choice < 0).all(1)
    empty = torch.arange(len(rows)) >= plan.offsets[-1]
    x[nowhere], rows[empty] = torch.nan, torch.nan
    if dtype == torch.float64:
        gates = gates.double()
    experts = make_experts(shape, dtype, bias=bias, seed=seed + 3)
    linear = dict(rows=rows, weight=experts.in_weight, bias=experts.in_bias, offsets=plan.offsets)
    return [
        Case("permute", dict(x=x, plan=plan), dtype, empty),
        Case("combine", dict(rows=rows, gates=gates, plan=plan), dtype, nowhere),
        Case("grouped_linear", linear, dtype, empty),
    ]


def experts_case(
    shape="odd", routing="capacity", dtype=torch.float32, activation="gelu", bias=True, gated=False, seed=0, **options
) -> Case:
    """``options``: further arguments of the op, or sizes that replace those of the shape."""
    shape = SHAPES.get(shape, shape)
    shape = shape._replace(**{name: options.pop(name) for name in ("width", "hidden") if name in options})
    gates, plan = route(shape, routing, seed)
    x, nowhere = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 10), (plan.row_of_choice < 0).all(1)
    x[nowhere], gates[nowhere] = torch.nan, torch.nan
    experts = make_experts(shape, dtype, activation, bias, gated, seed + 20)
    if dtype == torch.float64:
        gates = gates.double()
    arguments = dict(x=x, gates=gates, plan=plan) | experts._asdict() | options
    return Case("expert_mlp", arguments, dtype, nowhere)


def glu_case(shape="odd", routing="capacity", dtype=torch.float32, activation="silu", **options) -> Case:
    plain = experts_case(shape, routing, dtype, activation, bias=False, gated=True)
    names = ("x", "gates", "plan", "out_weight", "activation")
    both = torch.cat((plain.arguments["gate_weight"], plain.arguments["in_weight"]), dim=1)
    arguments = {name: plain.arguments[name] for name in names} | {"gate_in_weight": both} | options
    return plain._replace(op="expert_glu", arguments=arguments)


def dense_case(shape="odd", dtype=torch.float32, activation="gelu", bias=True, gated=False) -> Case:
    shape = SHAPES.get(shape, shape)
    experts = make_experts(shape._replace(experts=1), dtype, activation, bias, gated)
    one = {name: value[0] if isinstance(value, Tensor) else value for name, value in experts._asdict().items()}
    return Case("dense_mlp", {"x": randn(shape.tokens, shape.width, dtype=dtype)} | one, dtype)


def dense_oracle(x, **mlp) -> Tensor:
    """One expert that takes every token."""
    plan = ck.reference.dispatch(torch.zeros(len(x), 1, dtype=torch.int32), 1)
    experts = {name: value[None] if isinstance(value, Tensor) else value for name, value in mlp.items()}
    return ck.reference.expert_mlp(x, x.new_ones(len(x), 1), plan, **experts)


def results(
    case: Case, oracle: bool = False, frozen: Iterable[str] = (), device: str = "cpu", only: str | None = None
) -> dict[str, Tensor]:
    """The outputs of a call, and the gradients of its floating arguments but those that are frozen.

    only: the name of the one output whose gradient comes in.
    """
    given = tree_map_only(Tensor, lambda t: t.to(device), double(case.arguments) if oracle else case.arguments)
    if oracle:
        given.pop("recompute", None)
    constant = {"selection_bias", "priority", *(given if case.op == "dense_mlp" else frozen)}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in constant
    }
    op = dense_oracle if oracle and case.op == "dense_mlp" else getattr(ck.reference if oracle else ck, case.op)
    out = op(**(given | leaves))
    outputs = {"output": out} if isinstance(out, Tensor) else out._asdict()
    found = {name: value.detach() for name, value in outputs.items()}
    smooth = [value for name, value in outputs.items() if value.requires_grad and only in (None, name)]
    if not smooth:
        return found
    drawn = (randn(value.numel(), dtype=case.dtype, seed=77 + n) for n, value in enumerate(smooth))
    incoming = [values.to(value).view_as(value) for values, value in zip(drawn, smooth, strict=True)]
    if case.unread is not None:
        incoming[0][case.unread.to(device)] = 0.0 if oracle else torch.nan
    gradients = torch.autograd.grad(smooth, list(leaves.values()), incoming)
    return found | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def assert_follows_oracle(case: Case, device: str = "cpu", only: str | None = None) -> None:
    """Every output and every gradient against the op in plain torch in float64."""
    ours, oracle = (results(case, oracle, device=device, only=only) for oracle in (False, True))
    assert ours.keys() == oracle.keys()
    assert_same(
        *({what: value for what, value in of.items() if not value.is_floating_point()} for of in (ours, oracle))
    )
    for what, value in ours.items():
        if not value.is_floating_point():
            continue
        argument = case.arguments.get(what.removeprefix("gradient of "), next(iter(case.arguments.values())))
        wide = case.op == "router_logits" and what == "output"
        assert value.dtype == (case.arguments["weight"].dtype if wide else argument.dtype), what
        assert_follows(value, oracle[what], value.dtype if case.op == "router_logits" else case.dtype, what)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise the same results."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def strided(case: Case) -> Case:
    """The same call with every tensor in memory with gaps."""
    return case._replace(arguments=tree_map_only(Tensor, lambda t: torch.stack([t, t], -1)[..., 0], case.arguments))


def assert_nan_chooses_existing_experts() -> None:
    logits = randn(64, 8)
    logits[::3, 2] = torch.nan
    logits[1::3] = torch.nan
    experts = ck.topk_gating(logits, 3, True).expert_indices
    assert ((experts >= 0) & (experts < 8)).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())


def layer(router, x, experts, mask=None, capacity_factor=1.25) -> tuple[Tensor, Tensor]:
    """A sparse layer by the fused and by the single ops: outputs and a loss."""
    gating = ck.topk_gating(ck.router_logits(x, router, mask), 2, True, mask=mask)
    plan = ck.dispatch(gating.expert_indices, len(router), capacity_factor, gating.top_prob, mask)
    fused = ck.expert_mlp(x, gating.gates, plan, *experts)
    rows = ck.grouped_linear(ck.permute(x, plan), experts.in_weight, experts.in_bias, plan.offsets)
    unfused = ck.combine(ck.grouped_linear(rows, experts.out_weight, None, plan.offsets), gating.gates, plan)
    return fused + unfused, gating.z_loss + gating.mean_probs.square().sum()


def layer_and_gradients(router, x, experts, mask=None, function=layer, **options) -> list[Tensor]:
    leaves = [router, x, *(e for e in experts if isinstance(e, Tensor))]
    y, loss = function(router, x, experts, mask, **options)
    return [y, loss, *torch.autograd.grad(y.float().square().mean() + loss, leaves)]


def layer_arguments(dtype=torch.bfloat16, tokens=500, device="cuda", gated=False) -> tuple:
    experts = make_experts(Shape(tokens, 64, 128, 8, 2), dtype, gated=gated)
    router, x = randn(8, 64) / 8, randn(tokens, 64, dtype=dtype, seed=1)
    leaves = tree_map_only(Tensor, lambda t: t.to(device).requires_grad_(), (router, x, experts))
    return *leaves, torch.arange(tokens, device=device) % 5 > 0
