"""Pairwise similarity of a layer's experts, and their similarity to the dense MLP they were copied from.

Upcycled experts start out equal, and as long as they are, a sparse layer with normalized gates computes what the dense
MLP does. Similarity is the cosine between the flattened matrices of two experts: 1 if they are equal, 0 if they are
unrelated. Experts that are shards of an MLP (``MoEConfig.granularity``) are initialized equal if they are the same
shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dense.dense_mlp import DenseMLP
from ..dense.expert_init import experts_of
from ..dense.mlp_families import find_mlp
from ..moe.layer import SparseMoE, moe_layers

EQUAL = "equal"
BANDS = (
    (1 - 1e-5, EQUAL),
    (0.99, "nearly identical"),
    (0.9, "similar"),
    (0.5, "partly similar"),
    (0.1, "clearly different"),
)
"""Lower bounds of a mean cosine between experts, and the word for it."""
_BELOW_ALL = "unrelated"
_FIRST, _SECOND = ("in_weight", "gate_weight"), ("out_weight",)
"""Names of the parameters in an expert's first matrix, and in its second matrix."""


class Similarity(NamedTuple):
    """Cosines between the experts of one layer, float32 on the CPU.

    The first matrix of an expert is its input projection, together with the gate's in gated experts; the second is
    its output projection. Biases are ignored.
    """

    first: Tensor
    """[E, E]."""
    second: Tensor
    """[E, E]."""
    first_to_dense: Tensor | None = None
    """[E], of each expert with the matrix it was copied from; None without a dense MLP."""
    second_to_dense: Tensor | None = None
    """[E]."""
    granularity: int = 1
    """Number of shards per MLP: experts e and f were initialized equal if e = f modulo granularity."""

    @property
    def first_mean(self) -> float:
        """Mean cosine between first matrices over all pairs of experts initialized equal; NaN without a pair."""
        return mean_cosine(self.first, self.granularity)

    @property
    def second_mean(self) -> float:
        """The same for second matrices."""
        return mean_cosine(self.second, self.granularity)


@torch.no_grad()
def expert_similarity(layer: SparseMoE, dense: DenseMLP | None = None) -> Similarity:
    """Cosines between a layer's experts, and with the MLP ``dense`` if given.

    Raises:
        RuntimeError: the dense MLP's matrices, or their shards, do not have the experts' shapes.
    """
    granularity = layer.config.granularity
    experts = layer.state_dict()  # prepared layers have it too
    first, second = _features(experts, *_FIRST), _features(experts, *_SECOND)
    between = (first @ first.T).cpu(), (second @ second.T).cpu()
    if dense is None:
        return Similarity(*between, granularity=granularity)
    shards = experts_of(dense, granularity, granularity)
    to_dense = _with_own(first, _features(shards, *_FIRST)), _with_own(second, _features(shards, *_SECOND))
    return Similarity(*between, *to_dense, granularity)


def model_similarity(model: nn.Module, dense: nn.Module | None = None) -> dict[str, Similarity]:
    """``expert_similarity`` of every sparse layer of a model, by layer name.

    Args:
        dense: the model that was upcycled, or another dense model of the same architecture.

    Raises:
        ValueError: ``dense`` is sparse, or has another architecture.
    """
    layers = moe_layers(model)
    if dense is None:
        return {name: expert_similarity(layer) for name, layer in layers.items()}
    similarities = {}
    for name, layer in layers.items():
        try:
            similarities[name] = expert_similarity(layer, _dense_mlp(dense, name))
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of other widths
            raise ValueError(f"dense does not match the sparse model: {name}: {error}") from error
    return similarities


def in_words(cosine: float) -> str:
    """The word of ``BANDS`` for a mean cosine: "nearly identical" from 0.99 on."""
    return next((words for least, words in BANDS if cosine >= least), _BELOW_ALL)


def mean_cosine(cosines: Tensor, granularity: int = 1) -> float:
    """Mean of cosines [E, E] over all pairs of different experts with equal indices modulo ``granularity``; NaN without
    a pair."""
    shard = torch.arange(len(cosines)) % granularity
    pairs = cosines[(shard[:, None] == shard).triu(1)]
    return pairs.double().mean().item()


def _dense_mlp(dense: nn.Module, name: str) -> DenseMLP:
    """The MLP of the innermost block of a dense model that contains the sparse layer ``name``."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            return find_mlp(dense.get_submodule(".".join(parts[:length]))).dense
        except (AttributeError, TypeError):
            continue
    raise ValueError("it has no block of that name with a dense MLP")


def _features(parameters: dict[str, Tensor], *names: str) -> Tensor:
    """[E, features] of the matrices with these names together, normalized."""
    flat = [parameters[name].flatten(1) for name in names if name in parameters]
    return F.normalize(torch.cat(flat, 1).float(), dim=1)


def _with_own(experts: Tensor, shards: Tensor) -> Tensor:
    """[E] cosines of experts [E, features] with the shards [granularity, features] that they are copies of."""
    own = shards.to(experts.device).repeat(len(experts) // len(shards), 1)
    return (experts * own).sum(1).cpu()
