"""The registered ops with Triton's kernels in the place of the CPU's: a whole layer, forward and backward."""

import pytest
import torch
from moe_cases import Shape, assert_follows, double, make_experts, randn, route, with_grad

import clipup_kernels as ck
from clipup_kernels.backends import registry

pytestmark = pytest.mark.interpreter


@pytest.fixture
def on_triton(monkeypatch):
    """Chooses for CPU tensors what CUDA tensors get; returns the names of the ops that Triton has computed."""
    computed, function_of = set(), registry.function_of

    def as_on_cuda(op, dtype, device):
        if registry.choose(op, dtype, "cuda").backend.name == "triton":
            computed.add(op)
        return function_of(op, dtype, "cuda")

    monkeypatch.setattr(registry, "function_of", as_on_cuda)
    monkeypatch.setattr(registry, "_warn_without_triton", lambda index: None)
    return computed


def layer_and_gradients(router, x, experts, mask):
    logits = ck.router_logits(x, router, mask)
    gating = ck.topk_gating(logits, 2, True, mask=mask)
    plan = ck.dispatch(gating.expert_indices, logits.shape[1], 1.25, gating.top_prob, mask)
    rows = ck.grouped_linear(ck.permute(x, plan), experts.in_weight, experts.in_bias, plan.offsets)
    unfused = ck.combine(ck.grouped_linear(rows, experts.out_weight, None, plan.offsets), gating.gates, plan)
    y = ck.expert_mlp(x, gating.gates, plan, *experts) + unfused
    loss = y.square().mean() + gating.z_loss + gating.mean_probs.square().sum()
    leaves = [router, x, *(e for e in experts if isinstance(e, torch.Tensor))]
    return [y, loss, *torch.autograd.grad(loss, leaves)]


def test_a_layer_on_triton_follows_the_oracle_forward_and_backward(on_triton):
    tokens, shape = 90, Shape(90, 32, 48, 6, 2)
    router, x, mask = randn(6, 32), randn(tokens, 32, seed=1), torch.arange(tokens) % 5 > 0
    experts = make_experts(shape)
    ours = layer_and_gradients(router.requires_grad_(), x.requires_grad_(), with_grad(experts), mask)
    assert on_triton == set(registry.by_name("triton").modules) - {"expert_glu_forward", "expert_glu_backward"}
    wide = (double(router).requires_grad_(), double(x).requires_grad_(), with_grad(double(experts)), mask)
    for position, (value, want) in enumerate(zip(ours, layer_and_gradients(*wide), strict=True)):
        assert_follows(value, want, torch.float32, f"result {position}")


def test_gated_experts_in_one_weight_on_triton_follow_the_oracle(on_triton):
    shape = Shape(40, 16, 24, 4, 2)
    gates, plan = route(shape, "capacity")
    parts = make_experts(shape, bias=False, gated=True, activation="silu")
    gate_in, out = torch.cat((parts.gate_weight, parts.in_weight), dim=1), parts.out_weight
    results = []
    for op, wide in ((ck.expert_glu, False), (ck.reference.expert_glu, True)):
        x, g, first, second = (
            (one.double() if wide else one).detach().clone().requires_grad_()
            for one in (randn(40, 16, seed=1), gates, gate_in, out)
        )
        y = op(x, g, plan, first, second)
        y.square().sum().backward()
        results.append((y, x.grad, g.grad, first.grad, second.grad))
    assert {"expert_glu_forward", "expert_glu_backward"} <= on_triton
    for position, (value, want) in enumerate(zip(*results, strict=True)):
        assert_follows(value, want, torch.float32, f"result {position}")


def test_two_runs_on_triton_agree_bitwise(on_triton):
    experts = make_experts(Shape(40, 16, 24, 4, 2))
    arguments = (randn(4, 16).requires_grad_(), randn(40, 16, seed=1).requires_grad_(), with_grad(experts), None)
    first, second = layer_and_gradients(*arguments), layer_and_gradients(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
