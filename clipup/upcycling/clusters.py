"""``initialize_by_clusters``: router and experts start from clusters of the inputs that the MLPs of a model see."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..clip.hugging_face import is_hugging_face
from ..clip.row_samples import RowSample, calls_observed, run_batch
from ..dense.expert_clusters import reduce_to_clusters, spherical_k_means
from ..moe.evaluation import configs_changed, evaluating_dropless
from ..moe.layer import SparseMoE, moe_layers

Batch = tuple[Tensor, Tensor | None]


class Clusters(NamedTuple):
    """What ``initialize_by_clusters`` did to a layer."""

    sizes: list[int]
    """Tokens in the cluster of each expert."""
    ranks: dict[str, list[int]]
    """By matrix (``in_weight``, ...) the rank that each expert keeps."""


@torch.no_grad()
def initialize_by_clusters(
    model: nn.Module, batches: Iterable[Batch], energy: float = 0.99, tokens: int = 16_384, seed: int = 0
) -> dict[str, Clusters]:
    """Initializes an upcycled model's router and experts, in place, from what its MLPs see (arXiv 2604.13508).

    For every sparse layer: the inputs of its tokens are clustered by spherical k-means, one cluster for each expert.
    The router's rows become the clusters' directions, of length 1. Each matrix of an expert keeps what it does to its
    own cluster: with Z = X W^T the matrix's outputs on the cluster's tokens and U the leading left singular vectors of
    Z^T, as many as hold the share ``energy`` of its squares, W becomes ``U U^T W``, the best approximation of that rank
    on these tokens. Biases stay. The paper's distillation from an ensemble of the experts is not part of this.

    Experts differ from the start, and the model no longer computes the dense function.

    Args:
        model: the result of ``upcycle``, before training, without shards (``granularity``) and re-initialized units; of
            open_clip or timm.
        batches: (images [B, 3, H, W], texts [B, context_length]) on any device. Texts are None for a model without a
            text tower.
        energy: in (0, 1]; 1 keeps the matrices as they are. The paper's share could not be confirmed.
        tokens: as many tokens of a layer are kept in memory and clustered, chosen at random.
        seed: of that choice and of the clusters' first centers.

    Raises:
        TypeError, ValueError: a wrong argument, by name; no sparse layers, batches or fewer tokens than experts.
    """
    checks.plain_weights("model", model)
    checks.number("energy", energy)
    checks.check("energy", energy, 0 < energy <= 1, "above 0 and at most 1")
    checks.width("tokens", tokens)
    checks.check("seed", seed, checks.is_int(seed) and 0 <= seed < 1 << 63, "an int from 0 to 2^63 - 1")
    layers = moe_layers(model)
    if not layers:
        raise ValueError("model has no sparse layers; upcycle it first: clipup.upcycle(model, config)")
    for name, layer in layers.items():
        if not all(torch.equal(stacked, stacked[:1].expand_as(stacked)) for stacked in layer.parameters(recurse=False)):
            raise ValueError(
                f"the experts of {name} differ: they are shards, have re-initialized units, come from several models "
                "or were trained; initialize whole copies of one dense MLP, the result of upcycle(model)"
            )
    samples = _inputs_of(model, layers, batches, tokens, seed)
    experts = max(layer.config.num_experts for layer in layers.values())
    for name, rows in samples.items():
        if len(rows) < experts:
            raise ValueError(f"tokens or batches give {len(rows)} tokens for {name}, which has {experts} experts")
    results = {}
    for name, layer in layers.items():
        centers, owner = spherical_k_means(samples[name], layer.config.num_experts, seed)
        stacked = dict(layer.named_parameters(recurse=False))
        ranks = reduce_to_clusters(stacked, samples[name], owner, energy, layer.activation, layer.norm_eps)
        layer.router.weight.copy_(centers)
        results[name] = Clusters(owner.bincount(minlength=layer.config.num_experts).tolist(), ranks)
    return results


def _inputs_of(
    model: nn.Module, layers: dict[str, SparseMoE], batches: Iterable[Batch], tokens: int, seed: int
) -> dict[str, Tensor]:
    """[N, D] float32 on the CPU for every layer: tokens that are not masked, in the dense function."""
    samples = {name: RowSample(tokens, seed + number) for number, name in enumerate(layers)}
    observers: dict[nn.Module, Any] = {layer: partial(_record, samples[name]) for name, layer in layers.items()}
    dense = {"routing": "token_choice", "normalize_gates": "before_drop"}  # the model then computes the dense function
    with configs_changed(model, lambda config: dense), calls_observed(observers):
        run_batches(model, batches)
    return {name: sample.rows for name, sample in samples.items()}


def run_batches(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Runs a model of open_clip or timm in evaluation mode without dropping, for the hooks on its layers.

    Raises:
        TypeError: it is a model of transformers.
    """
    if is_hugging_face(model):
        raise TypeError("model is one of transformers, which is not supported here; use open_clip's or timm's")
    with evaluating_dropless(model):
        for batch in batches:
            run_batch(model, batch)


def _record(sample: RowSample, layer: SparseMoE, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    x, mask = (*inputs, *options.values(), None)[:2]
    rows = x.reshape(-1, x.shape[-1])
    sample.add(rows if mask is None else rows[mask.reshape(-1).bool()])
