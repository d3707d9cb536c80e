"""Plain torch's grouped products, and on every backend of the CPU: indices are checked, autocast changes nothing."""

import pytest
import torch
from moe_cases import DTYPES, Shape, experts_case, randn, results

import clipup_kernels as ck
from clipup_kernels.backends import extension, torch_eager

SHAPE = Shape(tokens=60, width=32, hidden=64, experts=16, k=2)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
        torch.testing.assert_close(run(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_rows_give_the_gradients_of_all_rows_at_once(cpu_backend, gated, monkeypatch):
    case = experts_case(SHAPE, gated=gated)
    whole = results(case)
    monkeypatch.setattr(torch_eager, "_ROWS_IN_CACHE", 7)
    blocks = results(case)
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)
