import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import (
    DTYPES,
    ROUTINGS,
    SHAPES,
    Shape,
    assert_follows,
    covering,
    double,
    make_experts,
    outputs_and_gradients,
    randn,
    route,
    with_grad,
)
from torch import Tensor

import clipup_kernels as ck


def assert_follows_oracle(shape, routing, dtype, activation="gelu", bias=True, gated=False, seed=0, **kwargs):
    gates, plan = route(shape, routing, seed)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 10)
    dy = randn(shape.tokens, shape.width, dtype=dtype, seed=seed + 11)
    experts = make_experts(shape, dtype, activation, bias, gated, seed + 20)
    ours = outputs_and_gradients(ck.expert_mlp, x, gates, plan, experts, dy, **kwargs)
    oracle = outputs_and_gradients(ck.reference.expert_mlp, double(x), double(gates), plan, double(experts), double(dy))
    assert ours.keys() == oracle.keys()
    for what, value in ours.items():
        assert value.dtype == (torch.float32 if what == "gradient of gates" else dtype)
        assert_follows(value, oracle[what], dtype, what)


@pytest.mark.parametrize(
    "case",
    covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES, gated=(False, True))
    + covering(activation=ck.ACTIVATIONS, bias=(False, True), gated=(False, True), recompute=("none", "full"))
    + covering(width=(0, 19), hidden=(0, 53), bias=(False, True), gated=(False, True), dtype=DTYPES),
)
def test_output_and_every_gradient_follow_the_oracle(case):
    case = {"shape": "odd", "routing": "capacity", "dtype": torch.float32} | case
    shape = SHAPES[case.pop("shape")]
    sizes = {name: case.pop(name) for name in ("width", "hidden") if name in case}
    assert_follows_oracle(shape._replace(**sizes), **case)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e, k: Shape(t, d, h, e, min(k, e)),
        st.integers(0, 40), st.integers(1, 24), st.integers(1, 24), st.integers(1, 9), st.integers(1, 4),
    ),
    routing=st.sampled_from(ROUTINGS),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_routing_follows_the_oracle(shape, routing, dtype, gated, seed):
    if dtype != torch.float32:  # few terms may cancel, and what is left of their rounding can be as large as their sum
        shape = shape._replace(tokens=shape.tokens + 8, width=shape.width + 8, hidden=shape.hidden + 8)
    assert_follows_oracle(shape, routing, dtype, gated=gated, seed=seed)


@pytest.mark.parametrize(("activation", "gated"), [*((name, False) for name in ck.ACTIVATIONS), ("silu", True)])
def test_float64_gradients_are_the_numerical_ones(activation, gated):
    shape = Shape(5, 3, 4, 3, 2)
    gates, plan = route(shape, "capacity")
    experts = with_grad(make_experts(shape, torch.float64, activation, gated=gated))
    x = randn(5, 3, dtype=torch.float64).requires_grad_()
    for recompute in ("none", "full"):
        assert torch.autograd.gradcheck(
            lambda x, gates, *experts, how=recompute: ck.expert_mlp(x, gates, plan, *experts, recompute=how),
            (x, gates.double().requires_grad_(), *experts),
        )


def test_tokens_without_a_row_get_zero_and_pass_no_gradient_even_when_they_hold_nan():
    shape = SHAPES["plain"]
    gates, plan = route(shape, "masked")
    nowhere = (plan.row_of_choice < 0).all(1)
    assert 0 < nowhere.sum() < shape.tokens
    x, dy = randn(shape.tokens, shape.width), randn(shape.tokens, shape.width, seed=1)
    x[nowhere], dy[nowhere], gates[nowhere] = torch.nan, torch.nan, torch.nan
    results = outputs_and_gradients(ck.expert_mlp, x, gates, plan, make_experts(shape), dy)
    assert all(value.isfinite().all() for value in results.values())
    assert (results["y"][nowhere] == 0).all()
    assert (results["gradient of x"][nowhere] == 0).all()
    assert (results["gradient of gates"][nowhere] == 0).all()


def test_experts_without_a_row_get_zero_gradients():
    shape = SHAPES["plain"]
    gates, plan = route(shape._replace(experts=4))
    plan = plan._replace(offsets=torch.cat([plan.offsets, plan.offsets[-1:].expand(4)]))
    results = outputs_and_gradients(
        ck.expert_mlp, randn(96, 32), gates, plan, make_experts(shape), randn(96, 32, seed=1)
    )
    for name in ("in_weight", "in_bias", "out_weight", "out_bias"):
        gradient = results[f"gradient of {name}"]
        assert (gradient[4:] == 0).all() and (gradient[:4] != 0).any()


def test_non_contiguous_arguments_give_the_same_result():
    shape = SHAPES["plain"]
    gates, plan = route(shape, "capacity")
    x, experts = randn(shape.tokens, shape.width), make_experts(shape)
    want = ck.expert_mlp(x, gates, plan, *experts)
    strided = experts._replace(
        in_weight=experts.in_weight.mT.contiguous().mT, out_weight=experts.out_weight.mT.contiguous().mT
    )
    spread = torch.stack([x, x], -1)[..., 0]
    assert not spread.is_contiguous() and not strided.in_weight.is_contiguous()
    torch.testing.assert_close(ck.expert_mlp(spread, gates.mT.contiguous().mT, plan, *strided), want)


@pytest.mark.parametrize("frozen", ["x", "gates", "experts", "all but x"])
def test_only_the_wanted_gradients_are_computed_and_they_do_not_change(frozen):
    shape = SHAPES["plain"]
    gates, plan = route(shape)
    x, dy, experts = randn(96, 32), randn(96, 32, seed=1), make_experts(shape)
    full = outputs_and_gradients(ck.expert_mlp, x, gates, plan, experts, dy)
    leaves = {"x": x, "gates": gates} | {n: t for n, t in experts._asdict().items() if isinstance(t, Tensor)}
    wanted = {
        "x": set(leaves) - {"x"}, "gates": set(leaves) - {"gates"}, "experts": {"x", "gates"}, "all but x": {"x"},
    }[frozen]  # fmt: skip
    leaves = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    arguments = {name: leaves.get(name, value) for name, value in experts._asdict().items()}
    ck.expert_mlp(leaves["x"], leaves["gates"], plan, *arguments.values()).backward(dy)
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, full[f"gradient of {name}"]), name
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_bitwise(dtype):
    shape = Shape(512, 64, 128, 8, 2)
    gates, plan = route(shape, "capacity")
    x, dy = randn(512, 64, dtype=dtype), randn(512, 64, dtype=dtype, seed=1)
    first, second = (
        outputs_and_gradients(ck.expert_mlp, x, gates, plan, make_experts(shape, dtype), dy) for _ in range(2)
    )
    for what, value in first.items():
        assert torch.equal(value, second[what]), what


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_saved_for_backward_are_arguments_and_z_alone(gated):
    shape = SHAPES["plain"]
    gates, plan = route(shape)
    x = randn(shape.tokens, shape.width).requires_grad_()
    experts = with_grad(make_experts(shape, gated=gated))
    arguments = {t.data_ptr() for t in (x, gates, *plan, *experts) if isinstance(t, Tensor)}

    def extra_elements(recompute):
        extra = []

        def pack(tensor):
            if tensor.data_ptr() not in arguments:
                extra.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ck.expert_mlp(x, gates, plan, *experts, recompute=recompute)
        return sum(extra)

    rows = shape.tokens * shape.k
    assert extra_elements("none") == rows * shape.hidden * (2 if gated else 1)
    assert extra_elements("full") == 0
