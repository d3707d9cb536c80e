"""The ops behave as torch's own: opcheck, torch.compile, meta tensors, FlopCounterMode, second derivatives refused."""

import pytest
import torch
from moe_cases import (
    SHAPES,
    dense_case,
    experts_case,
    gating_case,
    glu_case,
    make_experts,
    plan_case,
    randn,
    route,
    router_case,
    rows_cases,
    with_grad,
)
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import clipup_kernels as ck
from clipup_kernels.ops.sparse_mlp import packed_sparse_mlp

SHAPE = SHAPES["plain"]
PACKS = ck.packed_layout(torch.float32) != "plain"


class Calls(TorchDispatchMode):
    """Keeps the registered ops that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clipup":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def run(case, backward=True):
    """Both passes of a public op on finite numbers."""
    finite = {n: v.nan_to_num() if torch.is_tensor(v) else v for n, v in case.arguments.items()}
    leaves = {n: v.requires_grad_(backward) for n, v in finite.items() if torch.is_tensor(v) and v.is_floating_point()}
    out = getattr(ck, case.op)(**(finite | leaves))
    outputs = [out] if torch.is_tensor(out) else out
    if any(output.requires_grad for output in outputs):
        sum(output.square().sum() for output in outputs if output.requires_grad).backward()


def run_packed():
    """Of the ops on packed weights, which the CPU's compiled code alone has."""
    gates, plan = route(SHAPE)
    x, rows = randn(SHAPE.tokens, SHAPE.width), randn(SHAPE.tokens * SHAPE.k, SHAPE.width)
    experts = make_experts(SHAPE)
    packed = {name: ck.pack_weight(getattr(experts, name)) for name in ("in_weight", "out_weight")}
    ck.grouped_linear(rows, packed["in_weight"], experts.in_bias, plan.offsets)
    ck.dense_mlp(x, ck.pack_weight(experts.in_weight[0]), None, ck.pack_weight(experts.out_weight[0]), None)
    ck.expert_mlp(x, gates, plan, *experts._replace(**packed))
    packed_sparse_mlp(x, randn(SHAPE.experts, SHAPE.width), 2, *experts._replace(**packed), mask=x[:, 0] > 0)


def calls():
    """Calls of every registered op, made by the public ones."""
    plain = dict(shape="plain", routing="capacity")
    with Calls() as seen:
        run(router_case((96, 32, 8), masked=0.3))
        for options in (dict(masked=0.3, biased=0.3), dict(renormalize=False)):
            run(gating_case(96, 8, 2, **options))
        for options in (dict(factor=1.0, prioritised=True, masked=0.3), {}):
            run(plan_case(96, 8, 2, **options))
        for case in (*rows_cases(**plain), rows_cases(**plain, bias=False)[2]):
            run(case)
        for case in (experts_case(**plain), experts_case(**plain, gated=True), experts_case(**plain, recompute="full")):
            run(case)
        run(experts_case(**plain), backward=False)
        run(glu_case(**plain))
        run(dense_case("plain", gated=True), backward=False)
        if PACKS:
            run_packed()
    return seen.found


CALLS = calls()


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[op.name() for op, _ in CALLS])
def test_opcheck_accepts(op, arguments):
    differentiable = "backward" not in op.name() and "packed" not in op.name() and "gather_sum" not in op.name()
    inputs = [
        a.detach().requires_grad_(differentiable and "dense" not in op.name())
        if torch.is_tensor(a) and a.is_floating_point()
        else a
        for a in arguments
    ]
    opcheck(op, tuple(inputs))


def test_every_op_is_checked():
    on_cpus = {name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if "clipup::" in name}
    missing = on_cpus - {op.name() for op, _ in CALLS}
    assert not missing or (not PACKS and all("packed" in name for name in missing))


def moe(logits, x, experts, mask=None, capacity_factor=1.25):
    gating = ck.topk_gating(logits, 2, True, mask=mask)
    plan = ck.dispatch(gating.expert_indices, logits.shape[1], capacity_factor, gating.top_prob, mask)
    y = ck.expert_mlp(x, gating.gates, plan, *experts)
    return y, gating.z_loss + gating.mean_probs.square().sum()


def moe_and_gradients(function=moe, tokens=96, dtype=torch.float32, gated=False, **options):
    logits = randn(tokens, SHAPE.experts).requires_grad_()
    x = randn(tokens, SHAPE.width, dtype=dtype, seed=1).requires_grad_()
    experts = with_grad(make_experts(SHAPE, dtype, gated=gated))
    y, loss = function(logits, x, experts, **options)
    (y.float().square().mean() + loss).backward()
    return [y.detach(), loss.detach(), *(leaf.grad for leaf in (logits, x, *experts[:4]))]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("backend", "dtype", "gated"),
    [(None, torch.float32, False), ("torch_eager", torch.bfloat16, True)],
)
def test_compiled_without_graph_breaks_gives_the_eager_result_for_any_size_and_capacity(
    force_backend, backend, dtype, gated, compiler
):
    force_backend(backend)
    torch._dynamo.reset()  # what other tests have compiled counts towards the limit
    compiled = torch.compile(moe, fullgraph=True, backend=compiler)
    for tokens, factor in ((96, 1.25), (40, 0.5), (40, None)):
        options = dict(tokens=tokens, dtype=dtype, gated=gated, capacity_factor=factor)
        for eager, other in zip(moe_and_gradients(**options), moe_and_gradients(compiled, **options), strict=True):
            torch.testing.assert_close(other, eager)


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


SIZE = SHAPE.width * SHAPE.hidden


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        (rows_cases("plain", "dropless")[2], 3 * 2 * SHAPE.tokens * SHAPE.k * SIZE),
        (router_case((96, 32, 8)), 3 * 2 * SHAPE.tokens * SHAPE.width * SHAPE.experts),
        (dense_case("plain"), 2 * 2 * SHAPE.tokens * SIZE),
    ],
    ids=lambda value: getattr(value, "op", None),
)
def test_flops_of_the_other_products_are_counted(case, flops):
    with FlopCounterMode(display=False) as counter:
        run(case, backward=case.op != "dense_mlp")
    assert counter.get_total_flops() == flops
