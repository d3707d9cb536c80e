"""permute, gather_sum, combine and its backward; bfloat16 is not tried, since the interpreter computes it wrongly."""

import pytest
import torch
from moe_cases import ROUTINGS, SHAPES, Shape, assert_follows, covering, double, randn, route

from clipup_kernels.backends import torch_eager
from clipup_kernels.triton import rows as triton_rows

pytestmark = pytest.mark.interpreter


def assert_rows_follow_oracle(shape, routing, dtype):
    gates, plan = route(shape, routing)
    x, dy = (randn(shape.tokens, shape.width, dtype=dtype, seed=seed) for seed in (1, 2))
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=3)
    end = int(plan.offsets[-1])
    rows[end:] = torch.nan
    for name, arguments in {
        "permute": (x, *plan),
        "gather_sum": (rows, plan.row_of_choice),
        "combine": (rows, gates, *plan),
        "combine_backward": (dy, rows, gates, *plan),
    }.items():
        ours, oracle = (
            getattr(module, name)(*args)
            for module, args in ((triton_rows, arguments), (torch_eager, double(arguments)))
        )
        if name != "combine_backward":
            ours, oracle = (ours,), (oracle,)
        for position, (value, want) in enumerate(zip(ours, oracle, strict=True)):
            assert value.dtype == (torch.float32 if position == 1 else dtype)
            assert_follows(value, want, dtype, f"{name}'s output {position}")


@pytest.mark.parametrize("case", covering(shape=SHAPES, routing=ROUTINGS, dtype=(torch.float32, torch.float16)))
def test_rows_follow_the_oracle(case):
    assert_rows_follow_oracle(SHAPES[case["shape"]], case["routing"], case["dtype"])


@pytest.mark.parametrize("width", [0, 1, 255, 300, 768])
def test_rows_wider_than_a_tile_follow_the_oracle(width):
    assert_rows_follow_oracle(Shape(21, width, 16, 4, 2), "capacity", torch.float16)


def test_a_dropped_choice_adds_nothing_even_when_its_gate_is_nan():
    shape = SHAPES["plain"]
    gates, plan = route(shape, "capacity")
    gates = torch.where(plan.row_of_choice < 0, torch.nan, gates)
    rows = randn(shape.tokens * shape.k, shape.width)
    assert triton_rows.combine(rows, gates, *plan).isfinite().all()
    d_rows, d_gates = triton_rows.combine_backward(randn(shape.tokens, shape.width), rows, gates, *plan)
    assert d_rows.isfinite().all() and (d_gates[plan.row_of_choice < 0] == 0).all()


def test_strided_arguments_are_read_as_they_are_indexed():
    gates, plan = route(SHAPES["plain"], "capacity")
    tokens, width, *_, k = SHAPES["plain"]
    x, rows = randn(width, tokens).T, randn(tokens * k, 2 * width)[:, ::2]
    gates = gates.T.contiguous().T
    assert not (x.is_contiguous() or rows.is_contiguous() or gates.is_contiguous())
    for name, strided in {"permute": (x, *plan), "combine": (rows, gates, *plan)}.items():
        dense = [argument.contiguous() for argument in strided]
        assert torch.equal(getattr(triton_rows, name)(*strided), getattr(triton_rows, name)(*dense))
    strided, dense = (
        triton_rows.combine_backward(x if kind == "strided" else x.contiguous(), rows, gates, *plan)
        for kind in ("strided", "dense")
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
