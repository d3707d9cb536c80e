"""The ops behave as torch's own: opcheck, torch.compile, meta tensors, FlopCounterMode, second derivatives refused."""

from contextlib import nullcontext

import pytest
import torch
from moe_cases import SHAPES, make_experts, randn, route, with_grad
from torch._dynamo import compiled_autograd
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck

ops = torch.ops.clipup
SHAPE = SHAPES["plain"]


def sample_arguments():
    gates, plan = route(SHAPE, "capacity")
    gates = gates.requires_grad_()
    x, rows = (randn(n, SHAPE.width).requires_grad_() for n in (SHAPE.tokens, SHAPE.tokens * SHAPE.k))
    logits = randn(SHAPE.tokens, SHAPE.experts).requires_grad_()
    mask = torch.arange(SHAPE.tokens) % 4 > 0
    plain, gated = with_grad(make_experts(SHAPE)), with_grad(make_experts(SHAPE, gated=True, activation="silu"))
    experts = ck.topk_gating(logits.detach(), SHAPE.k, True).expert_indices
    z = randn(SHAPE.tokens * SHAPE.k, SHAPE.hidden)
    glu = torch.cat([plain.in_weight, plain.in_weight], 1).detach().requires_grad_()
    dy = randn(SHAPE.tokens, SHAPE.width)

    def fused(e, *tail):
        return (x, gates, *plan, *e[:4], *e[5:], *tail)

    def detached(arguments):
        return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)

    backward = detached(fused(plain))
    samples = {
        "router_logits": (x, randn(SHAPE.experts, SHAPE.width).requires_grad_(), mask),
        "router_logits_backward": (logits.detach(), dy, randn(SHAPE.experts, SHAPE.width), mask, [True, True]),
        "topk_gating": (logits, SHAPE.k, True, randn(SHAPE.experts), mask),
        "topk_gating plain": (logits, SHAPE.k, False, None, None),
        "topk_gating_backward": detached((logits, experts, True, mask, gates, dy[:, 0], None, torch.tensor(1.0))),
        "dispatch": (experts, SHAPE.experts, 1.0, dy[:, 0], mask),
        "dispatch plain": (experts, SHAPE.experts, None, None, None),
        "permute": (x, *plan),
        "gather_sum": detached((rows, plan.row_of_choice)),
        "grouped_linear": (rows, plain.in_weight, plain.in_bias, plan.offsets),
        "grouped_linear no bias": (rows, plain.in_weight, None, plan.offsets),
        "grouped_linear_backward": detached((z, rows, plain.in_weight, plan.offsets, [True, True, False])),
        "combine": (rows, gates, *plan),
        "combine_backward": detached((dy, rows, gates, *plan)),
        "expert_mlp_forward": fused(plain, "gelu", True),
        "expert_mlp_forward gated": fused(gated, "silu", True),
        "expert_mlp_forward inference": detached(fused(plain, "gelu", False)),
        "expert_mlp_backward": (dy, *backward, z, "gelu", [True, True, True, True]),
        "expert_mlp_backward recomputing": (dy, *backward, x.new_empty(0), "gelu", [True, False, True, False]),
        "expert_glu_forward": (x, gates, *plan, glu, plain.out_weight, "silu", True),
        "expert_glu_backward": (
            *detached((dy, x, gates, *plan, glu, plain.out_weight, torch.stack([z, z]))),
            *("silu", [True, True, False, True]),
        ),
        "dense_mlp": (dy, *detached(one[0] for one in (*plain[:4], *gated[5:])), "gelu"),
    }
    return samples if ck.packed_layout(torch.float32) == "plain" else samples | packed_samples()


def packed_samples():
    """Of the ops on packed weights, which the CPU's compiled code alone has."""
    gates, plan = route(SHAPE)
    x, rows, router = (randn(n, SHAPE.width) for n in (SHAPE.tokens, SHAPE.tokens * SHAPE.k, SHAPE.experts))
    experts, of_one = make_experts(SHAPE), make_experts(SHAPE, gated=True)

    def operands(experts, pick=lambda weight: weight):
        packed = [None if w is None else ck.pack_weight(pick(w)) for w in (*experts[:3:2], experts.gate_weight)]
        blocks = [None if one is None else one.block for one in packed]
        biases = [None if bias is None else pick(bias) for bias in (*experts[1:4:2], experts.gate_bias)]
        return [one for pair in zip(blocks, biases, strict=True) for one in pair]

    tail = (SHAPE.hidden, "gelu", ck.packed_layout(torch.float32))
    routing = (None, torch.arange(SHAPE.tokens) % 4 > 0, SHAPE.k, True, 1.5, True, 0.5)
    return {
        "packed_grouped_linear": (rows, *operands(experts)[:2], plan.offsets, *tail[::2]),
        "packed_dense_mlp": (x, *operands(of_one, lambda weight: weight[0]), *tail),
        "packed_expert_mlp": (x, gates, *plan, *operands(experts), *tail),
        "packed_sparse_mlp": (x, router, *routing, *operands(experts), *tail),
    }


@pytest.mark.parametrize("name", sample_arguments())
def test_opcheck_accepts(name):
    opcheck(getattr(ops, name.split()[0]), sample_arguments()[name])


def test_every_op_is_checked():
    ops_on_cpus = {name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if "clipup::" in name}
    missing = {name.removeprefix("clipup::") for name in ops_on_cpus} - {name.split()[0] for name in sample_arguments()}
    assert not missing or (ck.packed_layout(torch.float32) == "plain" and all("packed" in name for name in missing))


def moe(logits, x, experts, mask=None, capacity_factor=1.25):
    gating = ck.topk_gating(logits, 2, True, mask=mask)
    plan = ck.dispatch(gating.expert_indices, logits.shape[1], capacity_factor, gating.top_prob, mask)
    y = ck.expert_mlp(x, gating.gates, plan, *experts)
    return y, gating.z_loss + gating.mean_probs.square().sum()


def test_compiled_autograd_gives_the_eager_gradients():
    gradients = []
    for compiler in (None, torch.compile(backend="aot_eager", fullgraph=True)):
        experts = with_grad(make_experts(SHAPE))
        leaves = [randn(SHAPE.tokens, n).requires_grad_() for n in (SHAPE.experts, SHAPE.width)]
        y, loss = moe(*leaves, experts)
        with nullcontext() if compiler is None else compiled_autograd._enable(compiler):
            (y.square().mean() + loss).backward()
        gradients.append([leaf.grad for leaf in (*leaves, *experts[:4])])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_graph_breaks_gives_the_eager_result_for_any_size_and_capacity(dtype):
    torch._dynamo.reset()  # what other tests have compiled counts towards the limit
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens, factor in ((96, 1.25), (40, 0.5), (40, None)):
        results = []
        for function in (moe, compiled):
            logits = randn(tokens, SHAPE.experts).requires_grad_()
            x = randn(tokens, SHAPE.width, dtype=dtype, seed=1).requires_grad_()
            experts = with_grad(make_experts(SHAPE, dtype))
            y, loss = function(logits, x, experts, capacity_factor=factor)
            (y.float().square().mean() + loss).backward()
            results.append([y.detach(), loss.detach(), logits.grad, x.grad, experts.in_weight.grad])
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize(("gated", "products"), [(False, 2), (True, 3)], ids=["plain", "gated"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_are_counted_forward_backward_and_recomputed(gated, products, glu, recompute):
    gates, plan = route(SHAPE)
    one = 2 * SHAPE.tokens * SHAPE.k * SHAPE.width * SHAPE.hidden
    x, experts = randn(SHAPE.tokens, SHAPE.width).requires_grad_(), with_grad(make_experts(SHAPE, gated=gated))
    with FlopCounterMode(display=False) as forward:
        if glu:
            products, whole = 3, torch.cat((experts.in_weight, experts.in_weight), 1)
            y = ck.expert_glu(x, gates, plan, whole, experts.out_weight, recompute=recompute)
        else:
            y = ck.expert_mlp(x, gates, plan, *experts, recompute=recompute)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    again = products - 1 if recompute == "full" else 0
    assert forward.get_total_flops() == products * one
    assert backward.get_total_flops() == (2 * products + again) * one


def test_flops_of_the_other_products_are_counted():
    _, plan = route(SHAPE)
    rows, x = randn(SHAPE.tokens * SHAPE.k, SHAPE.width).requires_grad_(), randn(SHAPE.tokens, SHAPE.width)
    experts = with_grad(make_experts(SHAPE))
    router = randn(SHAPE.experts, SHAPE.width).requires_grad_()
    size = SHAPE.width * SHAPE.hidden
    for flops, call in {
        3 * 2 * len(rows) * size: lambda: ck.grouped_linear(rows, experts.in_weight, None, plan.offsets).sum(),
        2 * 2 * SHAPE.tokens * SHAPE.width * SHAPE.experts: lambda: ck.router_logits(x, router).sum(),
    }.items():
        with FlopCounterMode(display=False) as counter:
            call().backward()
        assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        ck.dense_mlp(x, *(weight.detach()[0] for weight in experts[:4]))
    assert counter.get_total_flops() == 2 * 2 * SHAPE.tokens * size
