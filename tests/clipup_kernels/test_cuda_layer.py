"""Router, grouped products and whole experts on a GPU: the oracle's values and gradients, in every form and size."""

import pytest
import torch
from gpu_cases import NEEDS_GPU, on_cpu, on_gpu, poison_memory, waiting_is_an_error
from moe_cases import (
    DTYPES,
    ROUTINGS,
    SHAPES,
    Shape,
    assert_follows,
    covering,
    double,
    make_experts,
    outputs_and_gradients,
    randn,
    route,
    seeded,
)

import clipup_kernels as ck

pytestmark = NEEDS_GPU

SMALL = Shape(48, 32, 64, 4, 2)
TILED = Shape(3000, 256, 384, 8, 2)
"""Several tiles of every product; experts with some 750 rows."""
MANY_ROWS = Shape(5000, 256, 512, 4, 2)
"""More than 768 rows an expert, for which the products take their largest tiles."""


ROUTERS = {
    "small": (50, 160, 8),
    "no_tokens": (0, 32, 4),
    "odd": (33, 45, 19),
    "large": (20_000, 768, 8),
    "many_experts": (2000, 1024, 64),
}
"""T, D and E."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


def assert_experts_follow_oracle(shape, routing, dtype, activation="gelu", bias=True, gated=False, **kwargs):
    gates, plan = route(shape, routing)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=10)
    dy = randn(shape.tokens, shape.width, dtype=dtype, seed=11)
    arguments = (x, gates, plan, make_experts(shape, dtype, activation, bias, gated, 20), dy)
    ours = outputs_and_gradients(ck.expert_mlp, *on_gpu(arguments), **kwargs)
    oracle = outputs_and_gradients(ck.reference.expert_mlp, *double(on_gpu(arguments)))
    assert ours.keys() == oracle.keys()
    for what, value in ours.items():
        assert value.dtype == (torch.float32 if what == "gradient of gates" else dtype)
        assert_follows(value, oracle[what], dtype, what)


@pytest.mark.parametrize(
    "case",
    covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES, gated=(False, True))
    + covering(shape=("tiled", "many_rows"), routing=("dropless", "capacity", "one_expert_takes_all"), dtype=DTYPES[1:])
    + covering(activation=ck.ACTIVATIONS, bias=(True, False), gated=(False, True), recompute=("none", "full")),
)
def test_experts_follow_the_oracle(case):
    case = {"shape": "small", "routing": "capacity", "dtype": torch.bfloat16} | case
    shapes = SHAPES | {"small": SMALL, "tiled": TILED, "many_rows": MANY_ROWS}
    assert_experts_follow_oracle(**case | {"shape": shapes[case["shape"]]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_experts_follow_the_oracle(dtype):
    assert_experts_follow_oracle(SMALL, "capacity", dtype)


def assert_op_follows_oracle(name, leaves, rest, incoming, types):
    """The output and the gradients of ``leaves``, in the order of ``types``."""
    results = []
    for op, convert in ((getattr(ck, name), lambda t: t), (getattr(ck.reference, name), double)):
        inputs = [convert(leaf).cuda().requires_grad_() for leaf in leaves]
        out = op(*inputs, *rest)
        results.append([out, *torch.autograd.grad(out, inputs, convert(incoming).cuda())])
    for place, (kind, ours, oracle) in enumerate(zip(types, *results, strict=True)):
        assert_follows(ours, oracle, kind, f"output or gradient {place}")


@pytest.mark.parametrize("case", covering(shape=("small", "tiled"), bias=(False, True), dtype=DTYPES))
def test_grouped_products_follow_the_oracle(case):
    name, bias, dtype = case.values()
    shape = TILED if name == "tiled" else SHAPES["odd"]
    _, plan = route(shape, "capacity")
    rows, experts = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=1), make_experts(shape, dtype)
    leaves = (rows, experts.in_weight, *([experts.in_bias] if bias else []))
    rest = (plan.offsets.cuda(),) if bias else (None, plan.offsets.cuda())
    incoming = randn(len(rows), shape.hidden, dtype=dtype, seed=2)
    assert_op_follows_oracle("grouped_linear", leaves, rest, incoming, [dtype] * (len(leaves) + 1))


@pytest.mark.parametrize("case", covering(size=ROUTERS, dtype=DTYPES, masked=(None, 0.4, 1.0)))
def test_routers_follow_the_oracle(case):
    size, dtype, masked = case.values()
    tokens, width, experts = ROUTERS[size]
    x, weight = randn(tokens, width, dtype=dtype), randn(experts, width, seed=1)
    mask = None if masked is None else torch.rand(tokens, generator=seeded(3)) >= masked
    if mask is not None:
        x[~mask] = torch.nan
    types = (torch.float32, dtype, torch.float32)
    assert_op_follows_oracle("router_logits", (x, weight), (on_gpu(mask),), randn(tokens, experts, seed=2), types)


def test_inference_gives_what_training_gives():
    gates, plan = route(TILED)
    x, experts = randn(TILED.tokens, TILED.width, dtype=torch.bfloat16), make_experts(TILED, torch.bfloat16)
    x, gates, plan, experts = on_gpu((x, gates, plan, experts))
    trained = ck.expert_mlp(x.requires_grad_(), gates, plan, *experts)
    with torch.no_grad():
        assert torch.equal(ck.expert_mlp(x, gates, plan, *experts), trained)


def test_twenty_runs_on_many_rows_agree_bitwise():
    gates, plan = route(MANY_ROWS)
    x = randn(MANY_ROWS.tokens, MANY_ROWS.width, dtype=torch.bfloat16)
    arguments = on_gpu((x, gates, plan, make_experts(MANY_ROWS, torch.bfloat16), x))
    first = outputs_and_gradients(ck.expert_mlp, *arguments)
    for _ in range(19):
        again = outputs_and_gradients(ck.expert_mlp, *arguments)
        assert all(torch.equal(value, again[what]) for what, value in first.items())


@pytest.mark.parametrize("form", ["plain", "gated", "recomputed", "inference"])
def test_the_host_never_waits_for_experts(form):
    gates, plan = route(SMALL)
    x = randn(SMALL.tokens, SMALL.width, dtype=torch.bfloat16)
    arguments = on_gpu((x, gates, plan, make_experts(SMALL, torch.bfloat16, gated=form == "gated"), x))

    def run():
        if form == "inference":
            with torch.no_grad():
                return ck.expert_mlp(*arguments[:3], *arguments[3])
        return outputs_and_gradients(ck.expert_mlp, *arguments, recompute="full" if form == "recomputed" else "none")

    run()  # compiles what is not compiled yet
    with waiting_is_an_error():
        run()


def test_a_step_saves_z_and_the_routing_and_nothing_else_of_that_size():
    gates, plan = on_gpu(route(TILED))
    experts = on_gpu(make_experts(TILED, torch.bfloat16))
    x = randn(TILED.tokens, TILED.width, dtype=torch.bfloat16).cuda().requires_grad_()
    saved = {}
    arguments = {t.untyped_storage().data_ptr() for t in (x, gates, *plan, *experts) if isinstance(t, torch.Tensor)}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ck.expert_mlp(x, gates, plan, *experts)
    kept = sum(size for address, size in saved.items() if address not in arguments)
    assert y.requires_grad and kept == TILED.tokens * TILED.k * TILED.hidden * 2


def test_an_expert_beyond_two_to_the_31_elements_of_z_is_right():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    shape = Shape(360_000, 64, 3072, 2, 2)  # R * H = 2.2e9
    experts = on_gpu(make_experts(shape, torch.bfloat16))
    choices = torch.arange(2, device="cuda", dtype=torch.int32).expand(shape.tokens, 2).contiguous()
    plan = ck.dispatch(choices, 2)
    gates = torch.full((shape.tokens, 2), 0.5, device="cuda")
    some = randn(1000, shape.width, dtype=torch.bfloat16).cuda()
    x = some.repeat(shape.tokens // 1000, 1).requires_grad_()
    y = ck.expert_mlp(x, gates, plan, *experts)
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    few = ck.dispatch(choices[:1000].contiguous(), 2)
    leaf = some.double().requires_grad_()
    want = ck.reference.expert_mlp(leaf, gates[:1000].double(), few, *double(experts))
    (d_want,) = torch.autograd.grad(want, leaf, torch.ones_like(want))
    for part in (slice(0, 1000), slice(shape.tokens - 1000, None)):
        assert_follows(on_cpu(y[part]), on_cpu(want), torch.bfloat16, "y")
        assert_follows(on_cpu(d_x[part]), on_cpu(d_want), torch.bfloat16, "gradient of x")
