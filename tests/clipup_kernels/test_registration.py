"""The ops behave as torch's own: opcheck, torch.compile, meta tensors, FlopCounterMode, second derivatives refused."""

import pytest
import torch
from moe_cases import (
    SHAPES,
    dense_case,
    experts_case,
    gating_case,
    glu_case,
    layer,
    layer_and_gradients,
    layer_arguments,
    make_experts,
    plan_case,
    randn,
    route,
    router_case,
    rows_cases,
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
        for mask in (None, torch.zeros(1, 2, 9, 9)):
            ck.self_attention(randn(3, 9, 24), 2, mask)
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
        a.detach().requires_grad_(differentiable and not any(name in op.name() for name in ("dense", "attention")))
        if torch.is_tensor(a) and a.is_floating_point()
        else a
        for a in arguments
    ]
    opcheck(op, tuple(inputs))


@pytest.mark.parametrize("backend", [*(["torch_matmul"] if PACKS else []), "torch_eager"])
def test_outputs_for_transposed_arguments_are_as_the_compiler_expects(force_backend, backend):
    force_backend(backend)
    offsets = torch.tensor([0, 5, 7])
    weight = randn(2, 3, 4, seed=1).mT
    rows, d_out = randn(3, 7, seed=2).mT, randn(7, 4, seed=3)
    opcheck(torch.ops.clipup.grouped_linear_backward, (d_out, rows, weight, offsets, [True] * 3))
    opcheck(torch.ops.clipup.topk_gating, (randn(4, 9).mT, 2, True, None, None))
    opcheck(
        torch.ops.clipup.self_attention, (randn(5, 2, 48).transpose(0, 1), None, 2, None), test_utils="test_faketensor"
    )


def test_every_op_is_checked():
    on_cpus = {name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if "clipup::" in name}
    missing = on_cpus - {op.name() for op, _ in CALLS}
    assert not missing or (not PACKS and all("packed" in name for name in missing))


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
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for tokens, factor in ((96, 1.25), (40, 0.5), (40, None)):
        options = dict(
            zip(("router", "x", "experts", "mask"), layer_arguments(dtype, tokens, "cpu", gated), strict=True)
        )
        options["capacity_factor"] = factor
        eager, other = (layer_and_gradients(function=each, **options) for each in (layer, compiled))
        torch.testing.assert_close(other, eager)


SIZE = SHAPE.width * SHAPE.hidden
ONE = 2 * SHAPE.tokens * SHAPE.k * SIZE
"""One product of all experts. Both passes have three for each weight; z is recomputed by all but the last."""
EXPERTS = [
    (
        make("plain", "dropless", recompute=recompute, **form),
        (3 * weights + (weights - 1) * (recompute == "full")) * ONE,
    )
    for recompute in ("none", "full")
    for make, form, weights in ((experts_case, {}, 2), (experts_case, {"gated": True}, 3), (glu_case, {}, 3))
]


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        *EXPERTS,
        (rows_cases("plain", "dropless")[2], 3 * ONE),
        (router_case((96, 32, 8)), 3 * 2 * SHAPE.tokens * SHAPE.width * SHAPE.experts),
        (dense_case("plain"), 2 * 2 * SHAPE.tokens * SIZE),
    ],
    ids=lambda value: getattr(value, "op", None),
)
def test_flops_of_both_passes_are_counted(case, flops):
    with FlopCounterMode(display=False) as counter:
        run(case, backward=case.op != "dense_mlp")
    assert counter.get_total_flops() == flops
