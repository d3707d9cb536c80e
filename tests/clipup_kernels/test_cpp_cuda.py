"""topk_gating and dispatch as CUDA C++ on a GPU: the reference's values, bitwise the same every time, no host wait."""

import pytest
import torch
from gpu_cases import NEEDS_GPU, on_gpu, poison_memory, waiting_is_an_error
from moe_cases import assert_follows, double, randn, seeded

import clipup_kernels as ck
from clipup_kernels.backends import cpp_cuda, torch_eager

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(not cpp_cuda.built(), reason="the extension is built without CUDA"),
]

SIZES = {
    "no_tokens": (0, 8, 2),
    "one_token": (1, 4, 2),
    "one_choice": (1, 1, 1),
    "small": (777, 8, 2),
    "small_all_experts": (40, 33, 33),
    "small_most_experts": (300, 256, 8),
    "many_experts": (3000, 100, 3),
    "large": (50_000, 8, 2),
}
"""T, E and K; the small ones also run under compute-sanitizer (benchmarks/gpu_suite.sh)."""
LARGER = {"larger": (200_000, 8, 2), "more_tokens_and_most_experts": (3000, 256, 8)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    poison_memory()


@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "k"), SIZES.values(), ids=SIZES)
def test_gating_and_its_gradient_follow_the_oracle(tokens, experts, k, renormalize, masked):
    logits = randn(tokens, experts, seed=tokens)
    mask = torch.rand(tokens, generator=seeded(1)) >= masked if masked else None
    bias = 0.3 * randn(experts, seed=2) if tokens == 777 else None
    ours = cpp_cuda.topk_gating(logits.cuda(), k, renormalize, on_gpu(bias), on_gpu(mask))
    oracle = ck.reference.topk_gating(logits.double(), k, renormalize, double(bias), mask)
    for name, value, want in zip(oracle._fields, ours, oracle, strict=True):
        if want.is_floating_point():
            assert_follows(value.cpu(), want, torch.float32, name)
        else:
            assert torch.equal(value.cpu(), want), name

    incoming = (randn(tokens, k, seed=3), randn(tokens, seed=4), randn(experts, seed=5), torch.tensor(0.7))
    for given in range(16):
        gradients = [gradient if given >> i & 1 else None for i, gradient in enumerate(incoming)]
        ours_d = cpp_cuda.topk_gating_backward(
            logits.cuda(), oracle.expert_indices.cuda(), renormalize, on_gpu(mask), *map(on_gpu, gradients)
        )
        want = torch_eager.topk_gating_backward(
            logits.double(), oracle.expert_indices, renormalize, mask, *(double(gradient) for gradient in gradients)
        )
        assert_follows(ours_d.cpu(), want, torch.float32, f"gradient of logits, {given}")


def test_nan_and_ties_choose_as_on_the_cpu():
    few = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    logits = few[torch.randint(len(few), (500, 9), generator=seeded(0))]
    ours, cpu = cpp_cuda.topk_gating(logits.cuda(), 4, True), ck.topk_gating(logits, 4, True)
    assert torch.equal(ours[1].cpu(), cpu.expert_indices) and torch.equal(ours[5].cpu(), cpu.tokens_per_expert)
    torch.testing.assert_close(ours[0].cpu(), cpu.gates, equal_nan=True)


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("factor", [None, 0.3, 1.0, 1.1, 2.0])
@pytest.mark.parametrize(("tokens", "experts", "k"), (SIZES | LARGER).values(), ids=SIZES | LARGER)
def test_the_plan_is_the_oracles(tokens, experts, k, factor, prioritised):
    chosen = torch.rand(tokens, experts, generator=seeded(tokens)).argsort(1)[:, :k].int()
    priority = (torch.rand(tokens, generator=seeded(3)) * 50).round() if prioritised else None
    mask = torch.rand(tokens, generator=seeded(4)) < 0.8
    ours = cpp_cuda.dispatch(on_gpu(chosen), experts, factor, on_gpu(priority), on_gpu(mask))
    oracle = ck.dispatch(chosen, experts, factor, priority, mask)  # on the CPU, which the tests there hold to the rule
    for name, value, want in zip(oracle._fields, ours, oracle, strict=True):
        assert torch.equal(value.cpu(), want), name


def stages(logits, mask, gradients):
    gating = cpp_cuda.topk_gating(logits, 2, True, None, mask)
    plan = cpp_cuda.dispatch(gating[1], logits.shape[1], 1.25, gating[2], mask)
    return [*gating, *plan, cpp_cuda.topk_gating_backward(logits, gating[1], True, mask, *gradients)]


def stages_arguments(tokens=20_000):
    logits = randn(tokens, 8).cuda()
    gradients = on_gpu((randn(tokens, 2, seed=1), randn(tokens, seed=2), randn(8, seed=3), torch.tensor(0.7)))
    return logits, torch.arange(tokens, device="cuda") % 5 > 0, gradients


def test_twenty_runs_agree_bitwise():
    arguments = stages_arguments()
    first = stages(*arguments)
    for _ in range(19):
        poison_memory()
        assert all(torch.equal(a, b) for a, b in zip(first, stages(*arguments), strict=True))


def test_the_host_never_waits():
    arguments = stages_arguments()  # copied from pageable memory, for which the host waits
    with waiting_is_an_error():
        stages(*arguments)


def test_a_cuda_graph_replays_the_stages_with_new_inputs():
    arguments = stages_arguments()
    stages(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stages(*arguments)
    arguments[0].copy_(randn(*arguments[0].shape, seed=5))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, stages(*arguments), strict=True))
