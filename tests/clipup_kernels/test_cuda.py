"""The ops on a GPU: the reference's values, bitwise the same every time, and no host wait."""

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
    randn,
    route,
    seeded,
)

import clipup_kernels as ck

pytestmark = NEEDS_GPU


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


def test_triton_is_used():
    assert ck.backend_info()["cuda_fallback_reason"] is None


def layer(router, x, experts, mask=None):
    gating = ck.topk_gating(ck.router_logits(x, router, mask), 2, True, mask=mask)
    plan = ck.dispatch(gating.expert_indices, len(router), 1.25, gating.top_prob, mask)
    fused = ck.expert_mlp(x, gating.gates, plan, *experts)
    rows = ck.grouped_linear(ck.permute(x, plan), experts.in_weight, experts.in_bias, plan.offsets)
    unfused = ck.combine(ck.grouped_linear(rows, experts.out_weight, None, plan.offsets), gating.gates, plan)
    return fused + unfused, gating.z_loss + gating.mean_probs.square().sum()


def layer_and_gradients(router, x, experts, mask):
    leaves = [router, x, *(e for e in experts if isinstance(e, torch.Tensor))]
    y, loss = layer(router, x, experts, mask)
    return [y, loss, *torch.autograd.grad(y.float().square().mean() + loss, leaves)]


def layer_arguments(dtype=torch.bfloat16, tokens=500, device="cuda"):
    shape = Shape(tokens, 64, 128, 8, 2)
    experts = make_experts(shape, dtype)
    experts = type(experts)(*(e.to(device).requires_grad_() if isinstance(e, torch.Tensor) else e for e in experts))
    router = (randn(8, shape.width) / 8).to(device).requires_grad_()
    x = randn(tokens, shape.width, dtype=dtype, seed=1).to(device).requires_grad_()
    return router, x, experts, torch.arange(tokens, device=device) % 5 > 0


@pytest.mark.parametrize("case", covering(shape=SHAPES | {"large": None}, routing=ROUTINGS, dtype=DTYPES))
def test_rows_and_their_gradients_follow_the_oracle(case):
    shape = SHAPES.get(case["shape"], Shape(20_000, 768, 64, 8, 2))
    assert_rows_follow_oracle(shape, case["routing"], case["dtype"])


SIZES = [(0, 8, 2), (1, 4, 2), (777, 8, 2), (50_000, 8, 2), (300, 256, 8)]
"""T, E and K."""


@pytest.mark.parametrize("case", covering(size=SIZES, renormalize=(False, True), masked=(0.0, 0.4, 1.0)))
def test_gating_and_its_gradient_follow_the_oracle(case):
    (tokens, experts, k), renormalize, masked = case.values()
    logits = randn(tokens, experts, seed=tokens)
    mask = torch.rand(tokens, generator=seeded(1)) >= masked if masked else None
    bias = 0.3 * randn(experts, seed=2) if tokens == 777 else None
    ours_in, oracle_in = logits.cuda().requires_grad_(), logits.double().requires_grad_()
    ours = ck.topk_gating(ours_in, k, renormalize, on_gpu(bias), on_gpu(mask))
    oracle = ck.reference.topk_gating(oracle_in, k, renormalize, double(bias), mask)
    for name in ("expert_indices", "tokens_per_expert"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(oracle, name))
    loss, oracle_loss = 0.0, 0.0
    for position, name in enumerate(("gates", "top_prob", "mean_probs", "z_loss")):
        value, want = getattr(ours, name), getattr(oracle, name)
        assert_follows(value.cpu(), want, torch.float32, name)
        weight = randn(*want.shape, seed=100 + position) if want.dim() else torch.tensor(0.7)
        loss, oracle_loss = loss + (value * weight.cuda()).sum(), oracle_loss + (want * weight.double()).sum()
    (gradient,) = torch.autograd.grad(loss, ours_in)
    (oracle_gradient,) = torch.autograd.grad(oracle_loss, oracle_in)
    assert_follows(gradient.cpu(), oracle_gradient, torch.float32, "gradient of logits")


@pytest.mark.parametrize(
    "case", covering(size=[*SIZES, (200_000, 8, 2)], factor=(None, 0.7, 1.1), prioritised=(False, True))
)
def test_the_plan_is_the_oracles(case):
    (tokens, experts, k), factor, prioritised = case.values()
    chosen = torch.rand(tokens, experts, generator=seeded(tokens)).argsort(1)[:, :k].int()
    priority = (torch.rand(tokens, generator=seeded(3)) * 50).round() if prioritised else None
    mask = torch.rand(tokens, generator=seeded(4)) < 0.8
    ours = ck.dispatch(on_gpu(chosen), experts, factor, on_gpu(priority), on_gpu(mask))
    oracle = ck.dispatch(chosen, experts, factor, priority, mask)  # on the CPU, which the tests there hold to the rule
    for name, value, want in zip(oracle._fields, ours, oracle, strict=True):
        assert torch.equal(value.cpu(), want), name


def assert_rows_follow_oracle(shape, routing, dtype):
    gates, plan = route(shape, routing)
    x = randn(shape.tokens, shape.width, dtype=dtype, seed=1)
    rows = randn(shape.tokens * shape.k, shape.width, dtype=dtype, seed=2)
    for op, leaves, rest in (("permute", (x,), (plan,)), ("combine", (rows, gates), (plan,))):
        ours_in = [leaf.cuda().requires_grad_() for leaf in leaves]
        oracle_in = [leaf.double().requires_grad_() for leaf in leaves]
        out, want = getattr(ck, op)(*ours_in, *on_gpu(rest)), getattr(ck.reference, op)(*oracle_in, *rest)
        assert_follows(out.cpu(), want, dtype, op)
        incoming = randn(*want.shape, dtype=dtype, seed=3)
        grads = torch.autograd.grad(out, ours_in, incoming.cuda())
        oracle_grads = torch.autograd.grad(want, oracle_in, incoming.double())
        for grad, oracle_grad in zip(grads, oracle_grads, strict=True):
            assert_follows(grad.cpu(), oracle_grad, dtype, f"gradient of {op}")


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_agree_bitwise(dtype):
    arguments = layer_arguments(dtype)
    first = layer_and_gradients(*arguments)
    for _ in range(19):
        again = layer_and_gradients(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_host_never_waits():
    arguments = layer_arguments()
    layer_and_gradients(*arguments)  # compiles what is not compiled yet
    with waiting_is_an_error():
        layer_and_gradients(*arguments)


def test_a_cuda_graph_replays_the_layer_with_new_inputs():
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


def test_work_is_queued_on_the_current_stream():
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
    logits = randn(50, 8, dtype=torch.float64)
    ours, oracle = ck.topk_gating(logits.cuda(), 2, True), ck.reference.topk_gating(logits, 2, True)
    assert_follows(ours.gates.cpu(), oracle.gates, torch.float64)


def test_compiled_without_graph_breaks_gives_the_eager_result():
    arguments = layer_arguments()
    results = (function(*arguments) for function in (layer, torch.compile(layer, fullgraph=True)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_layer_follows_the_oracle_on_the_cpu():
    arguments = layer_arguments(torch.float32)
    y, loss = layer(*arguments)
    want, want_loss = layer(*(double(on_cpu(argument)) for argument in arguments))
    assert_follows(y.cpu(), want, torch.float32, "y")
    assert_follows(loss.cpu(), want_loss, torch.float32, "loss")
