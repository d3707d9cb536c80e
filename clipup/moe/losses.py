"""The router's auxiliary losses, as pure functions on tensors.

Axis legend: ``T`` tokens, ``E`` experts, ``K`` choices per token. Everything is computed in the inputs' type (float32
in the layer). ``mask`` is bool [T], False for masked tokens; None means that none is masked. If all tokens are masked,
a loss is 0 with zero gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance(mean_probs: Tensor, tokens_per_expert: Tensor, form: str = "topk", granularity: int = 1) -> Tensor:
    """E * sum_e f_e * P_e: 1 when routing is uniform, at most E.

    Switch Transformer (arXiv 2101.03961, eq. 4-6). Only P_e carries a gradient.

    Args:
        mean_probs: [E] P_e, router probability averaged over the unmasked tokens.
        tokens_per_expert: [K, E] number of tokens whose k-th choice is expert e, before dropping.
        form: which choices f_e counts: ``"topk"`` all of them, ``"top2"`` first choices only (GShard, arXiv 2006.16668,
            algorithm 1).
        granularity: number of experts that make up an MLP (``MoEConfig.granularity``); the first choices are as many.
    """
    counted = tokens_per_expert[:granularity] if form == "top2" else tokens_per_expert
    counts = counted.sum(0).to(mean_probs.dtype)
    share = counts / counts.sum().clamp_min(1)
    return share.numel() * (share * mean_probs).sum()


def router_z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5). logits: [T, E]."""
    return mean_over_tokens(logits.logsumexp(-1).square(), mask)


def importance(mean_probs: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' importance (V-MoE, arXiv 2106.05974, appendix A.2).

    mean_probs: [E] router probability without noise, averaged over tokens. The paper sums over tokens; the coefficient
    of variation is the same.
    """
    return _squared_variation(mean_probs)


def load(logits: Tensor, noisy_logits: Tensor, noise_std: float, k: int, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' expected load (V-MoE, arXiv 2106.05974, appendix A.2).

    The load of expert e is the mean over tokens of the probability that e is among the k largest if its noise is
    resampled: 1 - Phi((threshold - logit_e) / noise_std), with the token's k-th largest noisy logit as the threshold.

    Args:
        logits, noisy_logits: [T, E] before and after the noise.
        noise_std: standard deviation of the noise, in units of the logits; positive.
    """
    threshold = noisy_logits.topk(k, dim=-1).values[:, -1:]
    wins = torch.special.ndtr((logits - threshold) / noise_std)
    return _squared_variation(mean_over_tokens(wins, mask))


def local_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the tokens' router distributions, in nats; small for confident routing (LIMoE, arXiv 2206.02770,
    section 2.2, local entropy of one modality). logits: [T, E]."""
    return mean_over_tokens(entropy(logits.log_softmax(-1)), mask)


def global_entropy(mean_probs: Tensor, threshold: float) -> Tensor:
    """max(0, threshold - H(mean distribution)), in nats; 0 if enough experts are used (LIMoE, arXiv 2206.02770, section
    2.2, global entropy of one modality). mean_probs: [E], all 0 if every token is masked."""
    log_probs = mean_probs.clamp_min(torch.finfo(mean_probs.dtype).tiny).log()
    shortfall = (threshold - entropy(log_probs)).clamp_min(0)
    return torch.where(mean_probs.sum() > 0, shortfall, 0)


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the unmasked tokens (axis 0); 0 if there are none."""
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    kept = values.where(mask.view(-1, *[1] * (values.dim() - 1)), 0)
    return kept.sum(0) / mask.sum().clamp_min(1)


def entropy(log_probs: Tensor) -> Tensor:
    """H(p) in nats over the last axis."""
    return -(log_probs.exp() * log_probs).sum(-1)


def _squared_variation(values: Tensor) -> Tensor:
    """(standard deviation / mean)^2; 0 if all values are 0."""
    return values.var(correction=0) / values.mean().square().clamp_min(torch.finfo(values.dtype).tiny)
