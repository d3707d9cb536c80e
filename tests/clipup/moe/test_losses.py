"""Every loss against a value known in closed form, its own definition written out, and its edge cases."""

import math

import pytest
import torch

from clipup.moe import losses
from clipup_kernels import topk_gating

T, E, K = 64, 8, 2


@pytest.fixture
def logits():
    return torch.randn(T, E, dtype=torch.float64)


def uniform_picks():
    return torch.full((K, E), T // E)


@pytest.mark.parametrize("form", ["top2", "topk"])
def test_load_balance_is_one_when_uniform_and_e_when_one_expert_takes_all(form):
    assert losses.load_balance(torch.full((E,), 1 / E), uniform_picks(), form).item() == pytest.approx(1)
    one = torch.zeros(E).index_fill(0, torch.tensor(3), 1.0)
    assert losses.load_balance(one, (one * T).int().expand(K, E), form).item() == pytest.approx(E)


def test_load_balance_counts_first_choices_or_all(logits):
    gating = topk_gating(logits, K, True)
    probs = logits.softmax(-1).mean(0)
    experts = gating.expert_indices.long()
    first = torch.bincount(experts[:, 0], minlength=E) / T
    both = torch.bincount(experts.flatten(), minlength=E) / (K * T)
    assert losses.load_balance(gating.mean_probs, gating.tokens_per_expert, "top2").item() == pytest.approx(
        E * (first * probs).sum().item()
    )
    assert losses.load_balance(gating.mean_probs, gating.tokens_per_expert, "topk").item() == pytest.approx(
        E * (both * probs).sum().item()
    )


def test_router_z_is_the_squared_log_of_the_number_of_experts_at_zero_logits(logits):
    assert losses.router_z(torch.zeros(T, E)).item() == pytest.approx(math.log(E) ** 2)
    assert losses.router_z(logits).item() == pytest.approx(topk_gating(logits, K, True).z_loss.item())


def test_importance_is_the_squared_coefficient_of_variation():
    assert losses.importance(torch.full((E,), 1 / E)).item() == 0
    assert losses.importance(torch.tensor([1.0, 0, 0, 0])).item() == pytest.approx(3)  # variance 3/16 over mean^2 1/16
    scaled = torch.tensor([0.5, 0.3, 0.2])
    assert losses.importance(scaled * 100).item() == pytest.approx(losses.importance(scaled).item())


def test_load_is_zero_when_every_expert_is_as_likely_to_win():
    logits = torch.zeros(T, E)
    assert losses.load(logits, logits, 1 / E, K).item() == pytest.approx(0, abs=1e-12)


def test_load_estimates_how_often_an_expert_wins_when_its_noise_is_drawn_again():
    torch.manual_seed(0)
    std, draws = 0.5, 20_000
    logits = torch.randn(4, 3, dtype=torch.float64)
    noisy = logits + std * torch.randn_like(logits)
    threshold = noisy.topk(2).values[:, -1:]
    wins = logits + std * torch.randn(draws, *logits.shape, dtype=torch.float64) > threshold
    share = wins.double().mean((0, 1))
    expected = share.var(correction=0) / share.mean() ** 2
    assert losses.load(logits, noisy, std, 2).item() == pytest.approx(expected.item(), rel=0.1)


def test_local_entropy_is_log_e_for_undecided_tokens_and_zero_for_sure_ones():
    assert losses.local_entropy(torch.zeros(T, E)).item() == pytest.approx(math.log(E))
    assert losses.local_entropy(1e4 * torch.eye(E)).item() == pytest.approx(0, abs=1e-6)


def test_global_entropy_charges_only_what_is_missing_to_the_threshold():
    uniform = torch.full((E,), 1 / E)
    assert losses.global_entropy(uniform, math.log(E)).item() == pytest.approx(0, abs=1e-6)
    half = torch.tensor([0.5, 0.5, 0, 0])
    assert losses.global_entropy(half, math.log(4)).item() == pytest.approx(math.log(2))
    assert losses.global_entropy(half, 0.5).item() == 0


def token_losses(logits, mask):
    noisy = logits + 0.1 * torch.sin(37 * logits)
    return {
        "z": losses.router_z(logits, mask),
        "load": losses.load(logits, noisy, 0.1, K, mask),
        "local_entropy": losses.local_entropy(logits, mask),
    }


def test_tokens_that_take_no_part_count_nowhere(logits):
    mask = torch.arange(T) % 3 != 0
    garbage = logits.masked_fill(~mask[:, None], 1e4)
    whole = token_losses(logits[mask], None)
    for name, loss in token_losses(garbage, mask).items():
        assert loss.item() == pytest.approx(whole[name].item()), name


@pytest.mark.parametrize("tokens", [0, 5])
def test_losses_and_gradients_are_zero_when_no_token_takes_part(tokens):
    logits = torch.randn(tokens, E, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool)
    gating = topk_gating(logits, K, True, mask=mask)
    found = token_losses(logits, mask)
    found["balance"] = losses.load_balance(gating.mean_probs, gating.tokens_per_expert)
    found["importance"] = losses.importance(gating.mean_probs)
    found["global_entropy"] = losses.global_entropy(gating.mean_probs, math.log(E))
    for name, loss in found.items():
        assert loss.item() == 0, name
    (gradient,) = torch.autograd.grad(sum(found.values()), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_gradients_agree_with_finite_differences(logits):
    logits = logits[:6].requires_grad_()
    probs = torch.rand(E, dtype=torch.float64).requires_grad_()
    noisy = (logits + 0.3).detach()
    assert torch.autograd.gradcheck(lambda x: losses.load(x, noisy, 0.5, K), logits)
    assert torch.autograd.gradcheck(losses.local_entropy, logits)
    assert torch.autograd.gradcheck(losses.router_z, logits)
    assert torch.autograd.gradcheck(losses.importance, probs)
    assert torch.autograd.gradcheck(lambda p: losses.global_entropy(p.softmax(0), 2.5), probs)
    assert torch.autograd.gradcheck(lambda p: losses.load_balance(p, uniform_picks()), probs)
