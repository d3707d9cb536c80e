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


def test_router_z_is_that_of_the_op(logits):
    assert losses.router_z(logits).item() == pytest.approx(topk_gating(logits, K, True).z_loss.item())


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


NOISY = torch.linspace(-1, 1, 6 * E, dtype=torch.float64).sin().view(6, E)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.load(x, NOISY, 0.5, K),
        losses.local_entropy,
        losses.router_z,
        lambda x: losses.importance(x.softmax(-1).mean(0)),
        lambda x: losses.global_entropy(x.softmax(-1).mean(0), 2.5),
        lambda x: losses.load_balance(x.softmax(-1).mean(0), torch.arange(K * E).view(K, E)),
    ],
)
def test_gradients_agree_with_finite_differences(loss, logits):
    assert torch.autograd.gradcheck(loss, logits[:6].requires_grad_())
