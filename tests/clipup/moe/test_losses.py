"""What the definition of the layer (``test_layer``) does not show of the losses: the load, thresholds, no tokens."""

import math

import pytest
import torch

from clipup.moe import losses
from clipup_kernels import topk_gating

E, K = 8, 2


def test_load_estimates_how_often_an_expert_wins_when_its_noise_is_drawn_again():
    torch.manual_seed(0)
    std, draws = 0.5, 20_000
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    noisy = logits.detach() + std * torch.randn_like(logits)
    threshold = noisy.topk(2).values[:, -1:]
    wins = logits + std * torch.randn(draws, *logits.shape, dtype=torch.float64) > threshold
    share = wins.double().mean((0, 1))
    expected = share.var(correction=0) / share.mean() ** 2
    assert losses.load(logits, noisy, std, 2).item() == pytest.approx(expected.item(), rel=0.1)
    assert torch.autograd.gradcheck(lambda x: losses.load(x, noisy, std, 2), logits)
    masked = [torch.cat([x, torch.full((2, 3), 1e4)]) for x in (logits, noisy)]
    torch.testing.assert_close(losses.load(*masked, std, 2, torch.arange(6) < 4), losses.load(logits, noisy, std, 2))


@pytest.mark.parametrize("tokens", [0, 5])
def test_losses_and_gradients_are_zero_when_no_token_takes_part(tokens):
    logits = torch.randn(tokens, E, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool)
    gating = topk_gating(logits, K, True, mask=mask)
    found = [
        losses.router_z(logits, mask),
        losses.load(logits, logits + 0.1 * torch.sin(37 * logits), 0.1, K, mask),
        losses.local_entropy(logits, mask),
        losses.load_balance(gating.mean_probs, gating.tokens_per_expert),
        losses.importance(gating.mean_probs),
        losses.global_entropy(gating.mean_probs, math.log(E)),
    ]
    assert [loss.item() for loss in found] == [0.0] * 6
    (gradient,) = torch.autograd.grad(sum(found), logits)
    assert not gradient.any()
