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
    double,
    make_experts,
    outputs_and_gradients,
    randn,
    route,
    seeded,
)

import clipup_kernels as ck

configs = pytest.importorskip("clipup_kernels.triton.configs")
expert_mlp = pytest.importorskip("clipup_kernels.triton.expert_mlp")
pytestmark = NEEDS_GPU

SMALL = Shape(48, 32, 64, 4, 2)
TILED = Shape(3000, 256, 384, 8, 2)
"""Several tiles of every product; experts with some 750 rows."""
MANY_ROWS = Shape(5000, 256, 512, 4, 2)
"""More than 768 rows an expert, for which the products take their largest tiles."""
NARROW = Shape(40_000, 64, 128, 4, 2)
"""Rows that fill every GPU twice over with tiles of 128."""


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_experts_follow_the_oracle(dtype):
    assert_experts_follow_oracle(SMALL, "capacity", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ["dropless", "capacity", "masked", "one_expert_takes_all"])
@pytest.mark.parametrize("shape", [TILED, MANY_ROWS], ids=["tiled", "many_rows"])
def test_large_experts_follow_the_oracle(shape, routing, dtype):
    assert_experts_follow_oracle(shape, routing, dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_and_routing_follows_the_oracle(shape, routing):
    assert_experts_follow_oracle(shape, routing, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["plain", "odd"])
def test_other_types_follow_the_oracle(shape, dtype):
    assert_experts_follow_oracle(SHAPES[shape], "capacity", dtype)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_every_form_of_expert_follows_the_oracle(activation, gated, recompute):
    assert_experts_follow_oracle(SMALL, "dropless", torch.bfloat16, activation, True, gated, recompute=recompute)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_experts_without_biases_follow_the_oracle(gated):
    assert_experts_follow_oracle(SMALL, "capacity", torch.bfloat16, "silu", False, gated)


def test_inference_gives_what_training_gives():
    gates, plan = route(TILED)
    x, experts = randn(TILED.tokens, TILED.width, dtype=torch.bfloat16), make_experts(TILED, torch.bfloat16)
    x, gates, plan, experts = on_gpu((x, gates, plan, experts))
    trained = ck.expert_mlp(x.requires_grad_(), gates, plan, *experts)
    with torch.no_grad():
        assert torch.equal(ck.expert_mlp(x, gates, plan, *experts), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("width", [16, 96, 128, 256, 512], ids=["small", "96", "128", "256", "512"])
def test_inference_by_both_products_in_one_launch_follows_the_oracle(monkeypatch, width, gated, dtype):
    kernel = configs.BOTH_KERNELS[gated]
    cases = configs.cases_both(configs.architecture(torch.device("cuda")), kernel)
    tile = next((case.config for case in cases if case.config.block_k >= width), None)
    if tile is None:
        pytest.skip("this GPU has no room for a tile that wide")
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda name, *which: tile if name == kernel else choose(name, *which))
    shape = Shape(2000, width, 4 * width, 2, 2)
    gates, plan = route(shape, "masked")
    x = randn(shape.tokens, width, dtype=dtype, seed=10)
    arguments = on_gpu((x, gates, plan, *make_experts(shape, dtype, gated=gated)))
    with torch.no_grad():
        ours = ck.expert_mlp(*arguments)
    assert_follows(ours, ck.reference.expert_mlp(*double(arguments)), dtype)


@pytest.fixture
def one_launch(monkeypatch, tmp_path):
    """A table that gives NARROW both products of inference in one launch; a list that grows with each of them."""
    monkeypatch.setenv(configs.TABLE_PATH, str(tmp_path / "table.json"))
    configs.forget()
    arch = configs.architecture(torch.device("cuda"))
    name = configs.entry_name(arch, "project_both", "half", "many", NARROW.width, NARROW.hidden)
    configs.store({name: configs.both_tile(arch, NARROW.width)})
    launch, launched = expert_mlp.project_both, []
    monkeypatch.setattr(expert_mlp, "project_both", lambda *which: launched.append(True) or launch(*which))
    yield launched
    configs.forget()


@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("quick_gelu", False), ("relu", True)])
def test_inference_in_one_launch_does_not_wait_for_the_host_and_can_be_captured(one_launch, activation, bias):
    gates, plan = route(NARROW, "masked")
    x = randn(NARROW.tokens, NARROW.width, dtype=torch.bfloat16, seed=10)
    x, gates, plan, experts = on_gpu((x, gates, plan, make_experts(NARROW, torch.bfloat16, activation, bias)))
    with torch.no_grad():
        first = ck.expert_mlp(x, gates, plan, *experts)
        assert one_launch
        with waiting_is_an_error():
            assert torch.equal(ck.expert_mlp(x, gates, plan, *experts), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ck.expert_mlp(x, gates, plan, *experts)
        captured.fill_(torch.nan)
        graph.replay()
    assert torch.equal(captured, first)
    assert_follows(first, ck.reference.expert_mlp(*double((x, gates, plan, experts))), torch.bfloat16)


@pytest.mark.usefixtures("one_launch")
def test_gradients_of_a_narrow_model_follow_the_oracle_where_z_is_computed_again():
    assert_experts_follow_oracle(NARROW, "capacity", torch.bfloat16, recompute="full")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("shape", [SHAPES["odd"], TILED], ids=["small", "tiled"])
def test_grouped_products_follow_the_oracle(shape, bias, dtype):
    _, plan = route(shape, "capacity")
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=1)
    experts = make_experts(shape, dtype)
    leaves = (rows, experts.in_weight, *([experts.in_bias] if bias else []))
    incoming = randn(len(rows), shape.hidden, dtype=dtype, seed=2)
    results = []
    for op, convert in ((ck.grouped_linear, lambda t: t), (ck.reference.grouped_linear, double)):
        inputs = [convert(leaf).cuda().requires_grad_() for leaf in leaves]
        out = op(inputs[0], inputs[1], inputs[2] if bias else None, plan.offsets.cuda())
        results.append([out, *torch.autograd.grad(out, inputs, convert(incoming).cuda())])
    for ours, oracle in zip(*results, strict=True):
        assert_follows(ours, oracle, dtype, "output or gradient")


@pytest.mark.parametrize("masked", [None, 0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ROUTERS.values(), ids=ROUTERS)
def test_routers_follow_the_oracle(size, dtype, masked):
    tokens, width, experts = size
    x, weight = randn(tokens, width, dtype=dtype), randn(experts, width, seed=1)
    d_logits = randn(tokens, experts, seed=2)
    mask = None if masked is None else torch.rand(tokens, generator=seeded(3)) >= masked
    if mask is not None:
        x[~mask] = torch.nan
    results = []
    for op, convert in ((ck.router_logits, lambda t: t), (ck.reference.router_logits, double)):
        leaves = [convert(leaf).cuda().requires_grad_() for leaf in (x, weight)]
        logits = op(*leaves, on_gpu(mask))
        results.append([logits, *torch.autograd.grad(logits, leaves, convert(d_logits).cuda())])
    for (what, kind), ours, oracle in zip(
        {"logits": torch.float32, "gradient of x": dtype, "gradient of weight": torch.float32}.items(),
        *results,
        strict=True,
    ):
        assert_follows(ours, oracle, kind, what)


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


def test_experts_compiled_without_graph_breaks_give_the_eager_result():
    gates, plan = on_gpu(route(SMALL))
    experts = on_gpu(make_experts(SMALL, torch.bfloat16))
    x = randn(SMALL.tokens, SMALL.width, dtype=torch.bfloat16).cuda()

    def layer(x, gates, *experts):
        return ck.expert_mlp(x, gates, plan, *experts).float().square().sum()

    eager, compiled = layer(x, gates, *experts), torch.compile(layer, fullgraph=True)(x, gates, *experts)
    torch.testing.assert_close(compiled, eager)


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
