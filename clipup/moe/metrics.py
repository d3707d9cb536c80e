"""``moe_metrics``: routing statistics of the last forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import losses
from .layer import SparseMoE, moe_layers
from .layer_state import LastRouting
from .router import log_scores, z_loss


@torch.no_grad()
def moe_metrics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Metrics of every sparse layer's last forward pass in the calling thread, in training or evaluation, by layer
    name.

    All are detached tensors on the layer's device, computed without synchronization:
    ``load`` [E] fraction of all choices per expert, before dropping (sums to 1),
    ``dropped`` [] fraction of the (token, choice) pairs that got no slot; with expert choice, of tokens without expert,
    ``router_entropy`` [] mean entropy of the tokens' router distributions, in nats,
    ``balance`` [] and ``z`` [] the unweighted losses,
    ``expert_indices`` [T, K] int32 the choices, -1 for masked tokens; with expert choice [T, E], -1 for absent ones.
    Layers that have not run in this thread are omitted.
    """
    last = {name: (layer, layer.state.last_routing) for name, layer in moe_layers(model).items()}
    return {name: _of_layer(layer, routing) for name, (layer, routing) in last.items() if routing is not None}


def _of_layer(layer: SparseMoE, last: LastRouting) -> dict[str, Tensor]:
    tokens_per_expert = last.tokens_per_expert.sum(0)
    pairs = tokens_per_expert.sum()
    return {
        "load": tokens_per_expert / pairs.clamp_min(1),
        "dropped": _without_expert(last)
        if layer.config.experts_choose
        else (pairs - last.offsets[-1]) / pairs.clamp_min(1),
        "router_entropy": losses.local_entropy(log_scores(last.logits, layer.config.score_function), last.mask),
        "balance": losses.load_balance(
            last.mean_probs, last.tokens_per_expert, layer.config.balance, layer.config.granularity
        ),
        "z": z_loss(last.z_loss, last.logits, last.mask, layer.config),
        "expert_indices": last.expert_indices,
    }


def _without_expert(last: LastRouting) -> Tensor:
    """[]: the fraction of the unmasked tokens that no expert chose."""
    alone = last.expert_indices[:, 0] < 0
    mask = torch.ones_like(alone) if last.mask is None else last.mask
    return (alone & mask).sum() / mask.sum().clamp_min(1)
