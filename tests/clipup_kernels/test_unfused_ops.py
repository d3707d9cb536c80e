"""permute, grouped_linear and combine: the public parts of expert_mlp."""

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
    randn,
    route,
    with_grad,
)

import clipup_kernels as ck


def assert_follows_with_gradients(op, oracle, arguments: dict, dtype):
    """Output and gradients of all floating arguments against the oracle in float64."""
    names = [n for n, a in arguments.items() if isinstance(a, torch.Tensor) and a.is_floating_point()]
    ours = {n: a.detach().clone().requires_grad_() if n in names else a for n, a in arguments.items()}
    theirs = {n: double(a).requires_grad_() if n in names else double(a) for n, a in arguments.items()}
    out, want = op(**ours), oracle(**theirs)
    assert_follows(out, want, dtype)
    seed_gradient = randn(*out.shape, dtype=dtype, seed=77)
    grads = torch.autograd.grad(out, [ours[n] for n in names], seed_gradient)
    want_grads = torch.autograd.grad(want, [theirs[n] for n in names], seed_gradient.double())
    for name, grad, want_grad in zip(names, grads, want_grads, strict=True):
        assert_follows(grad, want_grad, dtype, f"gradient of {name}")


@pytest.mark.parametrize("case", covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES))
def test_each_part_follows_the_oracle(case):
    shape, routing, dtype = SHAPES[case["shape"]], case["routing"], case["dtype"]
    gates, plan = route(shape, routing)
    experts = make_experts(shape, dtype)
    x, rows = randn(shape.tokens, shape.width, dtype=dtype), randn(shape.tokens * shape.k, shape.width, dtype=dtype)
    assert_follows_with_gradients(ck.permute, ck.reference.permute, dict(x=x, plan=plan), dtype)
    assert_follows_with_gradients(ck.combine, ck.reference.combine, dict(rows=rows, gates=gates, plan=plan), dtype)
    for bias in (None, experts.in_bias):
        assert_follows_with_gradients(
            ck.grouped_linear,
            ck.reference.grouped_linear,
            dict(rows=rows, weight=experts.in_weight, bias=bias, offsets=plan.offsets),
            dtype,
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e, k: Shape(t, d, h, e, min(k, e)),
        st.integers(0, 60), st.integers(1, 70), st.integers(1, 24), st.integers(1, 9), st.integers(1, 4),
    ),
    routing=st.sampled_from(ROUTINGS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_and_routing_follows_the_oracle(shape, routing, dtype, seed):
    if dtype != torch.float32:  # few terms may cancel, and what is left of their rounding can be as large as their sum
        shape = shape._replace(tokens=shape.tokens + 8, width=shape.width + 8)
    gates, plan = route(shape, routing, seed)
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=seed)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=seed)
    assert_follows_with_gradients(ck.permute, ck.reference.permute, dict(x=x, plan=plan), dtype)
    assert_follows_with_gradients(ck.combine, ck.reference.combine, dict(rows=rows, gates=gates, plan=plan), dtype)


def test_empty_rows_are_never_read_and_outputs_are_written_whole():
    shape = SHAPES["plain"]
    gates, plan = route(shape, "capacity")
    end = int(plan.offsets[-1])
    rows = randn(shape.tokens * shape.k, shape.width)
    rows[end:] = torch.nan
    rows.requires_grad_()
    gates = gates.requires_grad_()
    y = ck.combine(rows, gates, plan)
    y.backward(torch.ones_like(y))
    assert y.isfinite().all() and gates.grad.isfinite().all()
    assert (rows.grad[end:] == 0).all() and rows.grad[:end].isfinite().all()

    weight = make_experts(shape).in_weight.requires_grad_()
    rows = rows.detach().requires_grad_()
    out = ck.grouped_linear(rows, weight, None, plan.offsets)
    d_out = torch.ones_like(out)
    d_out[end:] = torch.nan
    out.backward(d_out)
    assert (out[end:] == 0).all() and out.isfinite().all()
    assert weight.grad.isfinite().all() and (rows.grad[end:] == 0).all() and rows.grad.isfinite().all()


def test_float64_gradients_are_the_numerical_ones():
    shape = Shape(5, 3, 4, 3, 2)
    gates, plan = route(shape, "capacity")
    x, rows = (randn(n, 3, dtype=torch.float64).requires_grad_() for n in (5, 10))
    experts = with_grad(make_experts(shape, torch.float64))
    assert torch.autograd.gradcheck(lambda x: ck.permute(x, plan), (x,))
    assert torch.autograd.gradcheck(
        lambda rows, gates: ck.combine(rows, gates, plan), (rows, gates.double().requires_grad_())
    )
    assert torch.autograd.gradcheck(
        lambda rows, weight, bias: ck.grouped_linear(rows, weight, bias, plan.offsets),
        (rows, experts.in_weight, experts.in_bias),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_sums_in_float32_in_the_order_of_the_choices(dtype):
    # 1 + 2^-k twice: lost if the sum were kept in bfloat16 or float16, kept when it is rounded once at the end.
    gates = torch.tensor([[1.0, 1.0, 1.0]])
    plan = ck.dispatch(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3)
    tiny = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    rows = torch.tensor([[1.0], [tiny], [tiny]], dtype=dtype)
    expected = ((torch.ones(()) + tiny) + tiny).to(dtype)
    assert ck.combine(rows, gates, plan).item() == expected.item() > 1
