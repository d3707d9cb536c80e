import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import assert_follows, randn, seeded

import clipup_kernels as ck

CASES = {
    "plain": dict(tokens=70, experts=8, k=2, renormalize=True),
    "raw gates": dict(tokens=70, experts=8, k=2, renormalize=False),
    "one choice": dict(tokens=33, experts=5, k=1, renormalize=False),
    "every expert": dict(tokens=9, experts=4, k=4, renormalize=True),
    "one expert": dict(tokens=9, experts=1, k=1, renormalize=True),
    "many experts": dict(tokens=300, experts=64, k=8, renormalize=True),
    "masked": dict(tokens=70, experts=8, k=2, renormalize=True, masked=0.5),
    "all masked": dict(tokens=7, experts=8, k=2, renormalize=True, masked=1.0),
    "no tokens": dict(tokens=0, experts=8, k=2, renormalize=True),
    "biased choice": dict(tokens=70, experts=8, k=3, renormalize=True, biased=0.3),
    "choice of no probability": dict(tokens=40, experts=8, k=2, renormalize=True, biased=10.0, scale=60.0),
    "large logits": dict(tokens=40, experts=8, k=2, renormalize=True, scale=60.0),
}


def arguments(tokens, experts, k, renormalize, masked=0.0, biased=0.0, scale=1.0, seed=0):
    logits = scale * randn(tokens, experts, seed=seed)
    mask = torch.rand(tokens, generator=seeded(seed)) >= masked if masked else None
    bias = biased * randn(experts, seed=seed + 1) if biased else None
    return logits, k, renormalize, bias, mask


def assert_gating_follows_oracle(logits, k, renormalize, bias, mask):
    ours_in, oracle_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = ck.topk_gating(ours_in, k, renormalize, bias, mask)
    oracle = ck.reference.topk_gating(oracle_in, k, renormalize, None if bias is None else bias.double(), mask)
    assert torch.equal(ours.expert_indices, oracle.expert_indices)
    assert torch.equal(ours.tokens_per_expert, oracle.tokens_per_expert)
    differentiable = ("gates", "top_prob", "mean_probs", "z_loss")
    loss, oracle_loss = 0.0, 0.0
    for position, name in enumerate(differentiable):
        value, want = getattr(ours, name), getattr(oracle, name)
        assert_follows(value, want, torch.float32, name)
        weight = randn(*want.shape, seed=100 + position) if want.dim() else torch.tensor(0.7)
        loss, oracle_loss = loss + (value * weight).sum(), oracle_loss + (want * weight.double()).sum()
    (gradient,) = torch.autograd.grad(loss, ours_in)
    (oracle_gradient,) = torch.autograd.grad(oracle_loss, oracle_in)
    assert_follows(gradient, oracle_gradient, torch.float32, "gradient of logits")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gating_and_its_gradient_follow_the_oracle(case):
    assert_gating_follows_oracle(*arguments(**case))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 600), experts=st.integers(1, 20), k=st.integers(1, 6), renormalize=st.booleans(),
    masked=st.sampled_from([0.0, 0.3, 1.0]), biased=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_gating_follows_the_oracle(tokens, experts, k, renormalize, masked, biased, seed):
    assert_gating_follows_oracle(*arguments(tokens, experts, min(k, experts), renormalize, masked, biased, seed=seed))


@pytest.mark.parametrize("name", ["gates", "top_prob", "mean_probs", "z_loss"])
def test_each_output_alone_has_its_gradient(name):
    logits = randn(20, 6)
    ours_in, oracle_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weight = randn(20, 2, seed=1) if name == "gates" else torch.tensor(1.0)
    loss = (getattr(ck.topk_gating(ours_in, 2, True), name) * weight).square().sum()
    oracle_loss = (getattr(ck.reference.topk_gating(oracle_in, 2, True), name) * weight.double()).square().sum()
    loss.backward()
    oracle_loss.backward()
    assert_follows(ours_in.grad, oracle_in.grad, torch.float32)


@pytest.mark.parametrize("renormalize", [False, True])
def test_float64_gradients_are_the_numerical_ones(renormalize):
    logits = randn(6, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, True, False, True, True, False])

    def differentiable(logits):
        gating = ck.topk_gating(logits, 2, renormalize, mask=mask)
        return gating.gates, gating.top_prob, gating.mean_probs, gating.z_loss

    assert torch.autograd.gradcheck(differentiable, (logits,))


def test_masked_tokens_count_nowhere_even_when_they_hold_nan():
    logits = randn(10, 4)
    mask = torch.arange(10) < 6
    clean = ck.topk_gating(logits[:6], 2, True)
    logits[6:] = torch.nan
    logits.requires_grad_()
    gating = ck.topk_gating(logits, 2, True, mask=mask)
    torch.testing.assert_close(gating.mean_probs, clean.mean_probs)
    torch.testing.assert_close(gating.z_loss, clean.z_loss)
    assert torch.equal(gating.tokens_per_expert, clean.tokens_per_expert)
    assert (
        (gating.expert_indices[6:] == -1).all() and (gating.gates[6:] == 0).all() and (gating.top_prob[6:] == 0).all()
    )
    (gating.gates.square().sum() + gating.mean_probs.square().sum() + gating.z_loss).backward()
    assert (logits.grad[6:] == 0).all() and logits.grad[:6].isfinite().all()


def test_nan_logits_never_give_an_expert_that_does_not_exist():
    logits = randn(64, 8)
    logits[::3, 2] = torch.nan
    logits[1::3] = torch.nan
    experts = ck.topk_gating(logits, 3, True).expert_indices
    assert ((experts >= 0) & (experts < 8)).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())


@pytest.mark.parametrize("package", [ck, ck.reference], ids=["op", "reference"])
def test_normalized_gates_sum_to_one_however_improbable_the_choice(package):
    logits = torch.tensor([[0.0, -88.0, -90.0], [0.0, -104.0, -300.0], [0.0, -104.0, -torch.inf]])
    bias = torch.tensor([0.0, 9.0, 3.0])
    assert package.topk_gating(logits, 1, True, bias).gates.tolist() == [[1.0]] * 3
    gates = package.topk_gating(logits, 2, True, bias).gates
    torch.testing.assert_close(gates[0], torch.tensor([0.0, -2.0]).softmax(-1))
    assert gates[1:].tolist() == [[1.0, 0.0]] * 2
    assert package.topk_gating(logits[2:], 1, True, torch.tensor([0.0, 0.0, 9.0])).gates.tolist() == [[0.0]]


def test_result_does_not_depend_on_the_number_of_threads():
    logits = randn(5000, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ck.topk_gating(logits, 2, True)
        torch.set_num_threads(2)
        two = ck.topk_gating(logits, 2, True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
