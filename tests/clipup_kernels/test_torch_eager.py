"""The backend in plain torch: no more arithmetic than the rows need, no waiting for a device, nothing mixed up."""

import pytest
import torch
from moe_cases import Shape, assert_follows, double, make_experts, randn, route
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from clipup_kernels import reference
from clipup_kernels.backends import grouped_products, torch_eager

SHAPE = Shape(tokens=60, width=32, hidden=64, experts=16, k=2)
ALL = [True] * 4


def offsets_of(*rows: int) -> torch.Tensor:
    return torch.tensor([0, *rows]).cumsum(0).int()


def forward_and_backward(x, gates, plan, experts):
    fields = (*plan, *experts[:4], *experts[5:])
    y, z = torch_eager.expert_mlp_forward(x, gates, *fields, experts[4], True)
    gradients = torch_eager.expert_mlp_backward(y, x, gates, *fields, z, experts[4], ALL)
    return y, *gradients


def arguments(routing="capacity", dtype=torch.float32, gated=False):
    gates, plan = route(SHAPE, routing)
    return randn(SHAPE.tokens, SHAPE.width, dtype=dtype), gates, plan, make_experts(SHAPE, dtype, gated=gated)


@pytest.mark.parametrize(
    "rows", [(10, 0, 3, 7), (0, 0, 0, 20), (20, 0, 0, 0), (0, 0, 0, 0), (5, 5, 5, 5), (1, 2, 3, 4)]
)
@pytest.mark.parametrize("empty", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [(8, 16), (5, 7)], ids=str)
def test_grouped_products_follow_a_loop_over_the_experts(rows, empty, dtype, widths):
    offsets, (inner, outer), number = offsets_of(*rows), widths, sum(rows) + empty
    x, other = randn(number, inner, dtype=dtype, seed=1), randn(number, outer, dtype=dtype, seed=2)
    weight, bias = randn(4, outer, inner, dtype=dtype, seed=3), randn(4, outer, dtype=dtype, seed=4)
    x[sum(rows) :] = other[sum(rows) :] = torch.nan  # empty rows are not read
    spans = [slice(a, b) for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    wide_x, wide_other, wide_weight, wide_bias = map(double, (x, other, weight, bias))
    products = torch.zeros(number, outer, dtype=torch.float64)
    for expert, span in enumerate(spans):
        products[span] = wide_x[span] @ wide_weight[expert].T + wide_bias[expert]

    assert_follows(grouped_products.project(x, weight, bias, offsets), products, dtype, "project")
    products = torch.stack([wide_x[span].T @ wide_other[span] for span in spans])
    assert_follows(grouped_products.outer(x, other, offsets), products, dtype, "outer")
    assert_follows(grouped_products.sums(x, offsets), torch.stack([wide_x[s].sum(0) for s in spans]), dtype, "sums")


@pytest.mark.parametrize("routing", ["dropless", "one_expert_takes_all"])
def test_arithmetic_is_at_most_twice_what_the_rows_need(routing):
    x, gates, plan, experts = arguments(routing)
    experts = [None if index in (1, 3) else one for index, one in enumerate(experts)]  # without biases
    with FlopCounterMode(display=False) as counter:
        forward_and_backward(x, gates, plan, experts)
    rows = SHAPE.tokens * SHAPE.k
    needed = 6 * 2 * rows * SHAPE.width * SHAPE.hidden
    assert needed * 0.9 < counter.get_total_flops() <= needed * 2.2


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_product_depends_on_values_so_the_host_never_waits(dtype, gated):
    x, gates, plan, experts = arguments("capacity", dtype, gated)
    with FakeTensorMode() as mode:  # tensors without values: whoever asks for one gets an error

        def without_values(value):
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        fake = type(plan)(*map(without_values, plan))
        results = forward_and_backward(
            without_values(x), without_values(gates), fake, type(experts)(*map(without_values, experts))
        )
    for value, real in zip(results, forward_and_backward(x, gates, plan, experts), strict=True):
        assert value.shape == real.shape and value.dtype == real.dtype


def test_a_nan_stays_with_its_expert():
    offsets = offsets_of(3, 4, 5)
    rows, other = randn(12, 8, seed=1), randn(12, 16, seed=2)
    rows[4, 0] = torch.nan
    for value in (grouped_products.outer(rows, other, offsets), grouped_products.sums(rows, offsets)):
        assert value[1].isnan().any() and value[[0, 2]].isfinite().all()
    products = grouped_products.project(rows, randn(3, 16, 8), None, offsets)
    assert products[4].isnan().all() and products[[*range(4), *range(5, 12)]].isfinite().all()


def test_blocks_hold_every_row_once():
    for rows in ((10, 0, 3, 7), (0, 0, 20), (1,) * 9, (0, 1)):
        offsets, number = offsets_of(*rows), sum(rows) + 2
        x = randn(number, 3)
        blocks = grouped_products.Blocks.of(offsets, number)
        want = torch.where((reference.expert_of_row(offsets, number) < len(rows))[:, None], x, 0)
        assert torch.equal(blocks.join(blocks.cut(x)), want)
        assert blocks.filled.sum() == sum(rows) and blocks.filled.numel() <= 2 * number + len(rows)
