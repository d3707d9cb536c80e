"""The backend in plain torch: no more arithmetic than the rows need, no waiting for a device, nothing mixed up."""

import pytest
import torch
from moe_cases import Shape, assert_follows, double, experts_case, pairwise, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import clipup_kernels as ck
from clipup_kernels import reference
from clipup_kernels.backends import extension, grouped_products, torch_eager

SHAPE = Shape(tokens=60, width=32, hidden=64, experts=16, k=2)
HALF = (torch.float32, torch.bfloat16)


def offsets_of(*rows: int) -> torch.Tensor:
    return torch.tensor([0, *rows]).cumsum(0).int()


@pytest.mark.parametrize(
    "case",
    pairwise(
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
    x, gates, plan, *experts = experts_case(SHAPE, "capacity", dtype, gated=gated).arguments.values()

    def both_passes(*tensors):
        *fields, activation = (*tensors[:9], *tensors[10:], tensors[9])
        y, z = torch_eager.expert_mlp_forward(*fields, activation, True)
        return y, *torch_eager.expert_mlp_backward(y, *fields, z, activation, [True] * 4)

    arguments = (x, gates, *plan, *experts)
    with FakeTensorMode() as mode:  # tensors without values: whoever asks for one gets an error
        fake = both_passes(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    for value, real in zip(fake, both_passes(*arguments), strict=True):
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


STRIDED = {
    "every second": lambda weight: weight.repeat_interleave(2, 2)[..., ::2],
    "part of wider rows": lambda weight: torch.cat([weight, weight[..., :1]], 2)[..., :-1],
    "experts last": lambda weight: weight.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "transposed": lambda weight: weight.mT.contiguous().mT,
    "one row for all": lambda weight: weight[:, :1].expand_as(weight),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", STRIDED)
def test_weights_may_have_any_strides(form, dtype):
    offsets, rows = offsets_of(3, 0, 9), randn(12, 16, dtype=dtype)
    weight = STRIDED[form](randn(3, 8, 16, dtype=dtype, seed=1))
    result = grouped_products.project(rows, weight, None, offsets)
    assert_follows(result, grouped_products.project(rows.double(), weight.double(), None, offsets), dtype)


compiled = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


@pytest.fixture(params=["torch_eager", *(pytest.param(name, marks=compiled) for name in ("torch_matmul", "cpp"))])
def cpu_backend(request, force_backend):
    force_backend(request.param)


INDICES = torch.arange(6, dtype=torch.int32)


def with_last(value):
    return torch.cat([INDICES[:5], torch.tensor([value], dtype=torch.int32)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("offsets", offsets) for offsets in ([0, 3, 7], [0, 3, 100_000_000], [0, 5, 3], [-1, 3, 6], [2, 3, 6])),
        *(("choice_of_row", with_last(value)) for value in (9, -7)),
        *(("row_of_choice", with_last(value).view(3, 2)) for value in (9, -7)),
    ],
)  # fmt: skip
def test_indices_outside_of_the_rows_are_refused_before_they_are_followed(cpu_backend, name, value):
    plan = ck.Plan(torch.tensor([0, 3, 6], dtype=torch.int32), INDICES, INDICES.view(3, 2))
    plan = plan._replace(**{name: torch.as_tensor(value, dtype=torch.int32)})
    x, rows, gates, weight = randn(3, 8), randn(6, 8), torch.rand(3, 2), randn(2, 8, 8)
    fields = (weight, None, weight, None, None, None, rows, "gelu", [True] * 4)
    calls = {
        "expert_mlp": lambda: ck.expert_mlp(x, gates, plan, weight, None, weight, None),
        "expert_mlp_backward": lambda: torch.ops.clipup.expert_mlp_backward(x, x, gates, *plan, *fields),
        "permute": lambda: ck.permute(x, plan),
        "combine": lambda: ck.combine(rows, gates, plan),
        "grouped_linear": lambda: ck.grouped_linear(rows, weight, None, plan.offsets),
        "grouped_linear_backward": lambda: torch.ops.clipup.grouped_linear_backward(
            rows, rows, weight, plan.offsets, [True] * 3
        ),
    }
    unread = {"offsets": ("combine",), "choice_of_row": ("combine",), "row_of_choice": ("permute",)}[name]
    if name != "offsets":
        unread += ("grouped_linear", "grouped_linear_backward")
    for op, call in calls.items():
        if op not in unread:
            with pytest.raises(ValueError, match=name):
                call()


@pytest.mark.parametrize("dtype", [*HALF, torch.float16], ids=str)
def test_autocast_changes_neither_types_nor_values(cpu_backend, dtype):
    arguments = experts_case(SHAPE, "dropless", dtype).arguments
    weights = [arguments[name] for name in ("in_weight", "in_bias", "out_weight", "out_bias")]
    router = randn(SHAPE.experts, SHAPE.width)

    def run():
        leaves = [t.detach().requires_grad_() for t in (arguments["x"], router, *weights)]
        logits = ck.router_logits(*leaves[:2])
        gating = ck.topk_gating(logits, SHAPE.k, True)
        plan = ck.dispatch(gating.expert_indices, SHAPE.experts)
        y = ck.expert_mlp(leaves[0], gating.gates, plan, *leaves[2:])
        dense = ck.dense_mlp(arguments["x"], *(leaf.detach()[0] for leaf in leaves[2:]))
        loss = y.float().square().sum() + gating.mean_probs.square().sum() + gating.z_loss
        return logits, *gating, y, dense, *torch.autograd.grad(loss, leaves)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        for value, want in zip(run(), plain, strict=True):
            assert value.dtype == want.dtype and torch.equal(value, want)
