"""Cluster-aware initialization (arXiv 2604.13508): experts and router start from clusters of the MLPs' inputs.

Axis legend: ``N`` tokens, ``D`` model width, ``E`` experts, ``I`` inputs and ``O`` outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipup_kernels.reference import activate

from .. import checks
from ..clip.hugging_face import is_hugging_face
from ..clip.inputs import encoders, image_text_pair
from ..dense.prepared import Prepared
from ..moe.evaluation import evaluating_dropless
from ..moe.layer import SparseMoE, moe_layers

Batch = tuple[Tensor, Tensor | None]
MAX_ROUNDS = 100
"""Rounds of k-means, which usually ends much earlier, when no token changes its cluster."""


class Clusters(NamedTuple):
    """What ``initialize_by_clusters`` did to a layer."""

    sizes: list[int]
    """Tokens in the cluster of each expert."""
    ranks: dict[str, list[int]]
    """By matrix (``in_weight``, ...) the rank that each expert keeps."""


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
    checks.module("model", model)
    checks.number("energy", energy)
    checks.check("energy", energy, 0 < energy <= 1, "above 0 and at most 1")
    checks.check("tokens", tokens, checks.is_int(tokens) and tokens >= 1, "a positive int")
    checks.check("seed", seed, checks.is_int(seed) and 0 <= seed < 1 << 63, "an int from 0 to 2^63 - 1")
    layers = moe_layers(model)
    if not layers:
        raise ValueError("model has no sparse layers; upcycle it first: clipup.upcycle(model, config)")
    for name, layer in layers.items():
        _check_layer(name, layer)
    samples = _inputs_of(model, layers, batches, tokens, seed)
    assigned = {}
    for name, layer in layers.items():  # all of them before the first layer changes
        found, experts = len(samples[name]), layer.config.num_experts
        if found < experts:
            limit = f"tokens is {tokens}" if found == tokens else f"batches has {found} tokens for {name}"
            raise ValueError(f"{limit}, fewer than the {experts} experts of {name}; pass more")
        if not samples[name].isfinite().all():
            raise ValueError(f"the inputs of {name} hold NaN or infinity, so they have no clusters")
        assigned[name] = spherical_k_means(samples[name], layer.config.num_experts, seed)
    return {name: _initialize(layer, samples[name], *assigned[name], energy) for name, layer in layers.items()}


def _check_layer(name: str, layer: SparseMoE) -> None:
    if isinstance(layer, Prepared):
        raise TypeError(f"{name} was prepared by clipup.accelerate, for inference; initialize the plain model")
    config = layer.config
    unlike = {"granularity > 1": config.granularity > 1, "reinit_ratio > 0": config.reinit_ratio > 0}
    unlike["experts divided over ranks"] = layer.expert_group() is not None
    if found := ", ".join(what for what, there in unlike.items() if there):
        raise ValueError(f"{name} has {found}; cluster-aware initialization needs whole copies of the dense MLP")
    for stacked in layer.parameters(recurse=False):
        if not torch.equal(stacked, stacked[:1].expand_as(stacked)):
            raise ValueError(
                f"the experts of {name} differ already: they were trained, or come from several models; initialize the "
                "result of upcycle(model)"
            )


class _Sample:
    """A uniform choice of ``most`` of the rows that it was given: those with the smallest random keys."""

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.random = most, torch.Generator().manual_seed(seed)
        self.rows, self.keys = torch.empty(0), torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.random, dtype=torch.float64)
        rows = rows.detach().float().cpu()
        self.rows, self.keys = torch.cat([self.rows.view(-1, rows.shape[1]), rows]), torch.cat([self.keys, keys])
        kept = self.keys.argsort()[: self.most]
        self.rows, self.keys = self.rows[kept], self.keys[kept]


def _inputs_of(
    model: nn.Module, layers: dict[str, SparseMoE], batches: Iterable[Batch], tokens: int, seed: int
) -> dict[str, Tensor]:
    """[N, D] float32 on the CPU for every layer: tokens that are not masked, in the dense function."""
    samples = {name: _Sample(tokens, seed + number) for number, name in enumerate(layers)}
    hooks = [layer.register_forward_hook(partial(_record, samples[name])) for name, layer in layers.items()]
    if is_hugging_face(model):
        raise TypeError(
            "cluster-aware initialization of transformers' models is not supported; use open_clip's or timm's"
        )
    encode, first = encoders(model), next(model.parameters())
    configs = {layer: layer.config for layer in layers.values()}
    seen = 0
    try:
        for layer, config in configs.items():  # so that the model computes the dense function
            layer.config = config.replace(routing="token_choice", normalize_gates="before_drop")
        with evaluating_dropless(model):
            for batch in batches:
                images, texts = image_text_pair(batch)
                if "text" in encode and texts is None:
                    raise ValueError("a batch has no texts, but the model has a text tower")
                encode["image"](images.to(first.device, first.dtype))
                if "text" in encode:
                    encode["text"](texts.to(first.device))
                seen += 1
    finally:
        for layer, config in configs.items():
            layer.config = config
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("batches is empty; pass at least one batch of images and texts")
    return {name: sample.rows for name, sample in samples.items()}


def _record(sample: _Sample, layer: SparseMoE, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask = inputs if len(inputs) == 2 else (*inputs, None)
    rows = x.reshape(-1, x.shape[-1])
    sample.add(rows if mask is None else rows[mask.reshape(-1).bool()])


def spherical_k_means(rows: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters by direction (Dhillon and Modha, Machine Learning 42, 2001), from centers that k-means++ draws.

    Args:
        rows: [N, D], N >= clusters.

    Returns:
        Directions [clusters, D] of length 1, or 0 where rows cancel out, and the cluster of every row [N]; none is
        empty.
    """
    points = F.normalize(rows, dim=-1)
    random = torch.Generator().manual_seed(seed)
    centers = points[torch.randint(len(points), (1,), generator=random)]
    for _ in range(1, clusters):
        distance = (1 - (points @ centers.T).amax(1)).clamp_min(1e-12)
        centers = torch.cat([centers, points[torch.multinomial(distance, 1, generator=random)]])
    owner = torch.full((len(points),), -1)
    for _ in range(MAX_ROUNDS):
        similarity = points @ centers.T
        new = similarity.argmax(1)
        for empty in (new.bincount(minlength=clusters) == 0).nonzero().flatten().tolist():
            farthest = similarity.amax(1).masked_fill(new.bincount(minlength=clusters)[new] < 2, math.inf).argmin()
            new[farthest], similarity[farthest, empty] = empty, 1.0
        if torch.equal(new, owner):
            break
        owner = new
        centers = F.normalize(torch.zeros_like(centers).index_add_(0, owner, points), dim=-1)
    return centers, owner


@torch.no_grad()
def _initialize(layer: SparseMoE, rows: Tensor, centers: Tensor, owner: Tensor, energy: float) -> Clusters:
    experts: dict[str, Any] = {
        name: None if (w := getattr(layer, name)) is None else w.detach().float().cpu() for name in _NAMES
    }
    ranks: dict[str, list[int]] = {}

    def reduce(name: str, expert: int, inputs: Tensor) -> Tensor:
        """The matrix of an expert for these inputs [n, I], written into the layer."""
        reduced, rank = reduced_matrix(experts[name][expert], inputs, energy)
        ranks.setdefault(name, []).append(rank)
        getattr(layer, name)[expert] = reduced.to(layer.in_weight)
        return reduced

    for expert in range(layer.config.num_experts):
        x = rows[owner == expert]
        hidden = F.linear(x, reduce("in_weight", expert, x), _bias(experts["in_bias"], expert))
        if experts["gate_weight"] is None:
            hidden = activate(hidden, layer.activation)
        else:
            gate = F.linear(x, reduce("gate_weight", expert, x), _bias(experts["gate_bias"], expert))
            hidden = activate(gate, layer.activation) * hidden
        if layer.ln_weight is not None and layer.ln_bias is not None:
            weight, bias = (one[expert].float().cpu() for one in (layer.ln_weight, layer.ln_bias))
            hidden = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, layer.norm_eps)
        reduce("out_weight", expert, hidden)
    layer.router.weight.copy_(centers)
    return Clusters(owner.bincount(minlength=layer.config.num_experts).tolist(), ranks)


_NAMES = ("in_weight", "in_bias", "gate_weight", "gate_bias", "out_weight")


def _bias(biases: Tensor | None, expert: int) -> Tensor | None:
    return None if biases is None else biases[expert]


def reduced_matrix(weight: Tensor, inputs: Tensor, energy: float) -> tuple[Tensor, int]:
    """``U U^T W`` for the fewest leading left singular vectors U of ``W X^T`` that hold a share of its squares.

    Args:
        weight: [O, I]. inputs: X [n, I]. energy: the share, in (0, 1]; 1 keeps the matrix.

    Returns:
        [O, I], and the number of vectors.
    """
    full = min(weight.shape)
    if energy == 1:
        return weight, full
    wide = weight.double()
    second = inputs.double().T @ inputs.double()
    values, vectors = torch.linalg.eigh(
        second
    )  # X^T X = V diag(values) V^T, so W X^T has the squares of W V sqrt(values)
    left, sizes, _ = torch.linalg.svd(wide @ (vectors * values.clamp_min(0).sqrt()), full_matrices=False)
    share = sizes.square().cumsum(0)
    if share[-1] == 0:  # no input, or only zeros: nothing says what to keep
        return weight, full
    rank = min(int((share < energy * share[-1]).sum()) + 1, full)
    kept = left[:, :rank]
    return (kept @ (kept.T @ wide)).to(weight.dtype), rank
