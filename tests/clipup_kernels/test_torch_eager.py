"""The backend in plain torch: no more arithmetic than the rows need, no waiting for a device, nothing mixed up."""

import pytest
import torch
from moe_cases import Shape, assert_follows, covering, double, make_experts, randn, route
from torch._subclasses.fake_tensor import FakeTensorMode

import clipup_kernels as ck
from clipup_kernels import reference
from clipup_kernels.backends import extension, grouped_products, torch_eager

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
    "case",
    covering(
        rows=[(10, 0, 3, 7), (0, 0, 0, 20), (20, 0, 0, 0), (0, 0, 0, 0), (5, 5, 5, 5)], empty=[0, 6],
        dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64], widths=[(8, 16), (5, 7)],
    ),
)  # fmt: skip
def test_grouped_products_follow_a_loop_over_the_experts(case):
    rows, empty, dtype, widths = case.values()
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


@pytest.mark.parametrize(("dtype", "gated"), [(torch.float32, False), (torch.bfloat16, True)])
def test_no_product_depends_on_values_so_the_host_never_waits(monkeypatch, dtype, gated):
    for check in ("check_offsets", "check_choices", "check_rows"):  # indices are checked on the CPU alone
        monkeypatch.setattr(torch_eager, check, lambda *_: None)
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


def test_blocks_hold_every_row_once_and_are_less_than_twice_the_rows():
    for rows in ((10, 0, 3, 7), (0, 0, 20), (1,) * 9, (0, 1), (65, *[0] * 63), (1,) * 50 + (0,) * 78):
        offsets, number = offsets_of(*rows), sum(rows) + 2
        x = randn(number, 3)
        blocks = grouped_products.Blocks.of(offsets, number)
        want = torch.where((reference.expert_of_row(offsets, number) < len(rows))[:, None], x, 0)
        assert torch.equal(blocks.join(blocks.cut(x)), want)
        assert blocks.filled.sum() == sum(rows) and blocks.filled.numel() < 2 * number


def strided(weight, form):
    """The weight [E, O, I] with the values that it has, in memory of another layout."""
    if form == "every second":
        return weight.repeat_interleave(2, 2)[..., ::2]
    if form == "part of wider rows":
        return torch.cat([weight, weight[..., :1]], 2)[..., :-1]
    if form == "experts last":
        return weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if form == "transposed":
        return weight.mT.contiguous().mT
    assert form == "one row for all"
    return weight[:, :1].expand_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form", ["every second", "part of wider rows", "experts last", "transposed", "one row for all"]
)
def test_weights_may_have_any_strides(form, dtype):
    offsets, rows = offsets_of(3, 0, 9), randn(12, 16, dtype=dtype)
    weight = strided(randn(3, 8, 16, dtype=dtype, seed=1), form)
    result = grouped_products.project(rows, weight, None, offsets)
    assert_follows(result, grouped_products.project(rows.double(), weight.double(), None, offsets), dtype)


compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


@pytest.fixture(params=["torch_eager", *(pytest.param(name, marks=compiled) for name in ("torch_matmul", "cpp"))])
def cpu_backend(request, force_backend):
    force_backend(request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 7], "from 0 to 6, got 7 at position 2"), ([0, 3, 100_000_000], "from 0 to 6, got 100000000"),
        ([0, 5, 3], "ascending"), ([-1, 3, 6], "got -1 at position 0"), ([2, 3, 6], "expected 0 first, got 2"),
    ],
)  # fmt: skip
def test_offsets_outside_of_the_rows_are_refused(cpu_backend, offsets, message, dtype):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    rows, weight, bias = randn(6, 8, dtype=dtype), randn(2, 8, 8, dtype=dtype), randn(2, 8, dtype=dtype)
    match = f"offsets: expected .*{message}" if "expected" not in message else f"offsets: {message}"
    with pytest.raises(ValueError, match=match):
        ck.grouped_linear(rows, weight, bias, offsets)
    for wanted in ([True] * 3, [False, False, True]):
        with pytest.raises(ValueError, match=match):
            torch.ops.clipup.grouped_linear_backward(rows, rows, weight, offsets, wanted)
    plan = ck.Plan(offsets, torch.arange(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32).view(3, 2))
    with pytest.raises(ValueError, match=match):
        ck.expert_mlp(rows[:3], torch.rand(3, 2), plan, weight, bias, weight, bias)
    with pytest.raises(ValueError, match=match):
        ck.permute(rows[:3], plan)


@pytest.mark.parametrize("name", ["choice_of_row", "row_of_choice"])
@pytest.mark.parametrize("value", [9, -7])
def test_indices_outside_of_the_rows_are_refused(cpu_backend, name, value):
    indices = torch.arange(6, dtype=torch.int32)
    damaged = torch.cat([indices[:5], torch.tensor([value], dtype=torch.int32)])
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    choice, row = (damaged, indices) if name == "choice_of_row" else (indices, damaged)
    plan = ck.Plan(offsets, choice, row.view(3, 2))
    x, gates, weight = randn(3, 8), torch.rand(3, 2), randn(2, 8, 8)
    lowest = 0 if name == "choice_of_row" else -1
    message = f"{name}: expected values from {lowest} to 5, got {value} at position 5"
    with pytest.raises(ValueError, match=message):
        ck.expert_mlp(x, gates, plan, weight, None, weight, None)
    fields = (weight, None, weight, None, None, None, randn(6, 8), "gelu", ALL)
    with pytest.raises(ValueError, match=message):
        torch.ops.clipup.expert_mlp_backward(x, x, gates, *plan, *fields)
    with pytest.raises(ValueError, match=message):
        ck.permute(x, plan) if name == "choice_of_row" else ck.combine(randn(6, 8), gates, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_neither_types_nor_values(cpu_backend, dtype):
    x, _, _, experts = arguments("capacity", dtype)
    router = randn(SHAPE.experts, SHAPE.width)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, router, *experts[:4])]
        logits = ck.router_logits(*leaves[:2])
        gating = ck.topk_gating(logits, SHAPE.k, True)
        plan = ck.dispatch(gating.expert_indices, SHAPE.experts)
        y = ck.expert_mlp(leaves[0], gating.gates, plan, *leaves[2:])
        dense = ck.dense_mlp(x, *(leaf.detach()[0] for leaf in leaves[2:]))
        loss = y.float().square().sum() + gating.mean_probs.square().sum() + gating.z_loss
        return logits, *gating, y, dense, *torch.autograd.grad(loss, leaves)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        for value, want in zip(run(), plain, strict=True):
            assert value.dtype == want.dtype and torch.equal(value, want)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "gated"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_compiled_step_follows_the_oracle_in_both_passes(cpu_backend, compiler, dtype, gated):
    x, gates, plan, experts = arguments(dtype=dtype, gated=gated)
    weights = [weight for weight in experts if isinstance(weight, torch.Tensor)]
    places = [name for name, weight in experts._asdict().items() if isinstance(weight, torch.Tensor)]
    upstream = randn(SHAPE.tokens, SHAPE.width, dtype=dtype, seed=9)

    def step(function, x, gates, *weights):
        return function(x, gates, plan, **dict(zip(places, weights, strict=True)), activation=experts.activation)

    def outputs(function, upstream, *tensors):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, upstream)

    compiled_step = torch.compile(lambda *tensors: step(ck.expert_mlp, *tensors), fullgraph=True, backend=compiler)
    found = outputs(compiled_step, upstream, x, gates, *weights)
    wide = [tensor.double() for tensor in (x, gates, *weights)]
    expected = outputs(lambda *tensors: step(reference.expert_mlp, *tensors), upstream.double(), *wide)
    for name, ours, oracle in zip(("y", "x", "gates", *places), found, expected, strict=True):
        assert_follows(ours, oracle, dtype, name)
