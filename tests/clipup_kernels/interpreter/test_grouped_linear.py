"""grouped_linear and its gradients on Triton's kernels, interpreted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Shape, assert_follows, double, pairwise, randn, route

from clipup_kernels import reference
from clipup_kernels.triton.grouped_linear import grouped_linear, grouped_linear_backward

pytestmark = pytest.mark.interpreter


CASES = {
    "one tile": Shape(40, 32, 64, 4, 2),
    "odd sizes": Shape(37, 19, 53, 5, 3),
    "one row": Shape(1, 16, 24, 4, 1),
    "no rows": Shape(0, 16, 24, 4, 2),
    "experts without rows": Shape(3, 16, 24, 12, 2),
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


@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=CASES, routing=("capacity", "all_dropped", "all_masked", "one_expert_takes_all"),
        dtype=(torch.float32, torch.float16), bias=(False, True),
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)  # fmt: skip
def test_output_and_gradients_follow_the_oracle_and_empty_rows_are_zero(case):
    assert_follows_oracle(**case | {"shape": CASES[case["shape"]]})


def test_several_tiles_follow_the_oracle():
    assert_follows_oracle(Shape(200, 70, 150, 2, 1), "capacity")


def test_only_the_wanted_gradients_are_computed():
    rows, weight, _, offsets, d_out = arguments(CASES["odd sizes"])
    full = grouped_linear_backward(d_out, rows, weight, offsets, [True] * 3)
    for wanted in itertools.product([False, True], repeat=3):
        for some, whole, want in zip(
            grouped_linear_backward(d_out, rows, weight, offsets, wanted), full, wanted, strict=True
        ):
            assert torch.equal(some, whole) if want else some.numel() == 0


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
