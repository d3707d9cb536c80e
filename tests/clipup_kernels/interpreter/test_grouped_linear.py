"""grouped_linear and its gradients on Triton's kernels, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Shape, assert_follows, double, randn, route

from clipup_kernels import reference
from clipup_kernels.triton.grouped_linear import grouped_linear, grouped_linear_backward

pytestmark = pytest.mark.interpreter

CASES = {
    "one tile": Shape(96, 32, 64, 8, 2),
    "odd sizes": Shape(37, 19, 53, 5, 3),
    "several tiles": Shape(330, 150, 310, 2, 1),
    "one row": Shape(1, 16, 24, 4, 1),
    "no rows": Shape(0, 16, 24, 4, 2),
    "one expert": Shape(33, 16, 24, 1, 1),
    "experts without rows": Shape(3, 16, 24, 64, 2),
}


def arguments(shape, routing="capacity", dtype=torch.float32, seed=0):
    """rows [R, D], weight [E, H, D], bias [E, H], offsets and d_out [R, H]; what is past offsets[E] is NaN."""
    _, plan = route(shape, routing, seed)
    filled = int(plan.offsets[-1])
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=seed)
    d_out = randn(shape.tokens * shape.k, shape.hidden, dtype=dtype, seed=seed + 1)
    rows[filled:], d_out[filled:] = torch.nan, torch.nan
    weight = (randn(shape.experts, shape.hidden, shape.width, seed=seed + 2) / shape.width**0.5).to(dtype)
    return rows, weight, randn(shape.experts, shape.hidden, dtype=dtype, seed=seed + 3), plan.offsets, d_out


def assert_follows_oracle(shape, routing="capacity", dtype=torch.float32, bias=True, seed=0):
    rows, weight, own_bias, offsets, d_out = arguments(shape, routing, dtype, seed)
    own_bias = own_bias if bias else None
    leaves = [double(t).requires_grad_() for t in (rows, weight) + ((own_bias,) if bias else ())]
    want = reference.grouped_linear(leaves[0], leaves[1], leaves[2] if bias else None, offsets)
    assert_follows(grouped_linear(rows, weight, own_bias, offsets), want.detach(), dtype)
    ours = grouped_linear_backward(d_out, rows, weight, offsets, [True, True, bias])
    filled = torch.arange(len(rows))[:, None] < offsets[-1]
    gradients = torch.autograd.grad(want, leaves, torch.where(filled, double(d_out), 0))
    for name, gradient, own in zip(("rows", "weight", "bias"), gradients, ours, strict=False):
        assert_follows(own, gradient, dtype, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_output_and_gradients_follow_the_oracle_and_empty_rows_are_zero(shape, dtype):
    assert_follows_oracle(shape, "capacity" if shape.tokens > 1 else "dropless", dtype)


@pytest.mark.parametrize("routing", ["all_dropped", "all_masked", "one_expert_takes_all"])
def test_uneven_routing_follows_the_oracle(routing):
    assert_follows_oracle(CASES["odd sizes"], routing)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda t, d, h, e: Shape(t, d, h, e, 1),
        st.integers(0, 200), st.integers(1, 150), st.integers(1, 150), st.integers(1, 9),
    ),
    bias=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_follows_the_oracle(shape, bias, seed):
    assert_follows_oracle(shape, "masked", bias=bias, seed=seed)


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_wanted_gradients_are_computed(wanted):
    rows, weight, _, offsets, d_out = arguments(CASES["odd sizes"])
    full = grouped_linear_backward(d_out, rows, weight, offsets, [True] * 3)
    some = grouped_linear_backward(d_out, rows, weight, offsets, [place == wanted for place in range(3)])
    for place in range(3):
        assert torch.equal(some[place], full[place]) if place == wanted else some[place].numel() == 0
