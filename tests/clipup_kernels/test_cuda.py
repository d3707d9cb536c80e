"""The ops on a GPU: the reference's values, bitwise the same every time, and no host wait.

Names with "small" also run under compute-sanitizer (benchmarks/gpu_suite.sh).
"""

import pytest
import torch
from gpu_cases import NEEDS_GPU, on_gpu, poison_memory, waiting_is_an_error
from moe_cases import (
    DTYPES,
    ROUTERS,
    ROUTINGS,
    SHAPES,
    Shape,
    assert_follows,
    assert_follows_oracle,
    assert_same,
    covering,
    double,
    experts_case,
    gating_case,
    layer,
    layer_and_gradients,
    layer_arguments,
    make_experts,
    plan_case,
    randn,
    results,
    router_case,
    rows_cases,
    seeded,
    usual,
)

import clipup_kernels as ck
from clipup_kernels.backends import registry

pytestmark = NEEDS_GPU

SIZES = {
    "no_tokens": (0, 8, 2),
    "one_token": (1, 4, 2),
    "small_777": (777, 8, 2),
    "small_all_experts": (40, 33, 33),
    "small_most_experts": (300, 256, 8),
    "large": (50_000, 8, 2),
}
"""T, E and K."""
LAYERS = SHAPES | {
    "small": Shape(48, 32, 64, 4, 2),
    "tiled": Shape(3000, 256, 384, 8, 2),  # several tiles of every product; experts with some 750 rows
    "many_rows": Shape(5000, 256, 512, 4, 2),  # more than 768 rows an expert, for which tiles are the largest
    "large": Shape(20_000, 768, 64, 8, 2),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


@pytest.fixture(params=["triton", "cpp_cuda"])
def backend(request, force_backend):
    """The kernels of routing: Triton's, and CUDA C++ where the extension has it."""
    if request.param == "cpp_cuda" and registry._without_cuda_extension() is not None:
        pytest.skip("the extension is built without CUDA")
    force_backend(request.param)


def test_triton_is_used():
    assert ck.backend_info()["cuda_fallback_reason"] is None


@pytest.mark.parametrize(
    "case",
    covering(
        size=[*ROUTERS, (20_000, 768, 8), (2000, 1024, 64)], dtype=DTYPES, masked=(None, 0.4, 1.0)
    ),
)  # fmt: skip
def test_routers_follow_the_oracle(case):
    assert_follows_oracle(router_case(**case), "cuda")


@pytest.mark.parametrize("case", covering(size=SIZES, renormalize=(False, True), masked=(None, 0.4, 1.0)))
def test_gating_and_its_gradient_follow_the_oracle(backend, case):
    size, renormalize, masked = case.values()
    assert_follows_oracle(gating_case(*SIZES[size], renormalize, masked, 0.3 if "777" in size else 0.0), "cuda")


def test_nan_and_ties_choose_as_on_the_cpu(backend):
    few = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    logits = few[torch.randint(len(few), (500, 9), generator=seeded(0))]
    ours, cpu = ck.topk_gating(logits.cuda(), 4, True), ck.topk_gating(logits, 4, True)
    assert torch.equal(ours.tokens_per_expert.cpu(), cpu.tokens_per_expert)
    torch.testing.assert_close(ours.gates.cpu(), cpu.gates, equal_nan=True)


@pytest.mark.parametrize(
    "case", covering(size=[*SIZES, "larger"], factor=(None, 0.3, 1.0, 1.1), prioritised=(False, True))
)
def test_the_plan_is_the_oracles(backend, case):
    size, factor, prioritised = case.values()
    plan = plan_case(*(SIZES | {"larger": (200_000, 8, 2)})[size], factor, prioritised, 0.2)
    ours = {name: value.cpu() for name, value in results(plan, device="cuda").items()}
    assert_same(ours, results(plan))  # the tests of the CPU hold that to the rule


@pytest.mark.parametrize(
    "case",
    covering(shape=[*SHAPES, "large"], routing=ROUTINGS, dtype=DTYPES)
    + covering(shape=("small", "tiled"), bias=(False, True), dtype=DTYPES),
)
def test_rows_and_grouped_products_follow_the_oracle(case):
    for one in rows_cases(**{"routing": "capacity"} | case | {"shape": LAYERS[case["shape"]]}):
        assert_follows_oracle(one, "cuda")


@pytest.mark.parametrize(
    "case",
    covering(shape=SHAPES, routing=ROUTINGS, dtype=DTYPES, gated=(False, True))
    + covering(shape=("tiled", "many_rows"), routing=("dropless", "capacity", "one_expert_takes_all"), dtype=DTYPES[1:])
    + covering(activation=ck.ACTIVATIONS, bias=(True, False), gated=(False, True), recompute=("none", "full"))
    + usual(shape=("small",), routing=("capacity",), dtype=DTYPES),
)
def test_experts_follow_the_oracle(case):
    case = {"shape": "small", "dtype": torch.bfloat16} | case
    assert_follows_oracle(experts_case(**case | {"shape": LAYERS[case["shape"]]}), "cuda")


def test_inference_gives_what_training_gives():
    arguments = layer_arguments(tokens=3000)
    trained, _ = layer(*arguments)
    with torch.no_grad():
        assert torch.equal(layer(*arguments)[0], trained)


@pytest.mark.parametrize(("dtype", "tokens"), [*((dtype, 500) for dtype in DTYPES), (torch.bfloat16, 20_000)], ids=str)
def test_twenty_runs_agree_bitwise(backend, dtype, tokens):
    arguments = layer_arguments(dtype, tokens)
    first = layer_and_gradients(*arguments)
    for _ in range(19):
        poison_memory()
        again = layer_and_gradients(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_host_never_waits(backend, gated):
    arguments = layer_arguments(gated=gated)
    layer_and_gradients(*arguments)  # compiles what is not compiled yet
    with torch.no_grad():
        layer(*arguments)
    with waiting_is_an_error():
        layer_and_gradients(*arguments)
        with torch.no_grad():
            layer(*arguments)


def test_a_cuda_graph_replays_the_layer_with_new_inputs(backend):
    arguments = layer_arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer_and_gradients(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer_and_gradients(*arguments)
    with torch.no_grad():
        for position, seed in ((0, 5), (1, 6)):
            arguments[position].copy_(randn(*arguments[position].shape, seed=seed))
    graph.replay()
    torch.cuda.synchronize()
    eager = layer_and_gradients(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_work_is_queued_on_the_current_stream(backend):
    logits = randn(50_000, 8).cuda()
    want = ck.topk_gating(logits, 2, True)
    late, stream = torch.zeros_like(logits), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        gating = ck.topk_gating(late, 2, True)
        plan = ck.dispatch(gating.expert_indices, 8)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(gating, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plan, ck.dispatch(want.expert_indices, 8), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current_stay_there():
    here, there = (layer_and_gradients(*layer_arguments(device=device)) for device in ("cuda:0", "cuda:1"))
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))


def test_float64_is_plain_torchs():
    assert_follows_oracle(gating_case(50, 8, 2, dtype=torch.float64), "cuda")


def test_compiled_without_graph_breaks_gives_the_eager_result():
    arguments = layer_arguments()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*arguments), layer(*arguments))


def test_compiled_into_graphs_gives_the_eager_result_in_every_step():
    step = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    router, x, experts, mask = layer_arguments()
    for number in range(4):  # it warms up, records and replays
        arguments = router, (x * (1 + number)).detach().requires_grad_(), experts, mask
        want = layer_and_gradients(*arguments)
        torch.testing.assert_close(layer_and_gradients(*arguments, function=step), want)


def test_rows_behind_two_to_the_31_elements_are_found():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    tokens, width = (1 << 21) + 100, 1024
    experts = (torch.arange(tokens, device="cuda", dtype=torch.int32) % 2)[:, None]
    plan = ck.dispatch(experts, 2)
    x = torch.randint(-100, 100, (tokens, 1), device="cuda").half().expand(tokens, width).contiguous()
    rows = ck.permute(x, plan)
    assert torch.equal(rows[:, 0], x[plan.choice_of_row.long(), 0]) and torch.equal(rows[:, -1], rows[:, 0])
    del rows
    y = ck.combine(x, torch.ones(tokens, 1, device="cuda"), plan)
    assert torch.equal(y[:, -1], x[plan.row_of_choice[:, 0].long(), -1])


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
        assert_follows(y[part].detach().cpu(), want.detach().cpu(), torch.bfloat16, "y")
        assert_follows(d_x[part].cpu(), d_want.cpu(), torch.bfloat16, "gradient of x")
