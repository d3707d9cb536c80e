"""How far the experts of a layer have parted, from each other and from the dense MLP that they were copies of.

Upcycled experts start out equal, and while they stay so a sparse layer with normalised gates computes what the dense
MLP would. Measured is the cosine between two experts' matrices, each taken as one long vector: 1 where they are equal,
0 where they have nothing in common.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mlp_families import find_mlp
from .mlp_parts import DenseMLP
from .moe import SparseMoE, moe_layers


class Similarity(NamedTuple):
    """Cosines between the experts of one layer, float32 on the CPU.

    First matrices are those of the input projection, of gated experts together with the gate's; second ones those of
    the output projection. Biases are left out.
    """

    first: Tensor
    """[E, E]."""
    second: Tensor
    """[E, E]."""
    first_to_dense: Tensor | None = None
    """[E]; None where no dense MLP was given."""
    second_to_dense: Tensor | None = None
    """[E]."""


@torch.no_grad()
def expert_similarity(layer: SparseMoE, dense: DenseMLP | None = None) -> Similarity:
    """Cosines between a layer's experts, and with the dense MLP ``dense`` where it is given.

    Raises:
        ValueError: the dense MLP's matrices are not of the experts' shapes.
    """
    first, second = _first(layer.in_weight, layer.gate_weight), _second(layer.out_weight)
    between = (_cosines(first, first), _cosines(second, second))
    if dense is None:
        return Similarity(*between)
    _check_shapes(layer, dense)
    gate = None if dense.gate_weight is None else dense.gate_weight[None]
    dense_first, dense_second = _first(dense.in_weight[None], gate), _second(dense.out_weight[None])
    return Similarity(*between, _cosines(first, dense_first)[:, 0], _cosines(second, dense_second)[:, 0])


def model_similarity(model: nn.Module, dense: nn.Module | None = None) -> dict[str, Similarity]:
    """``expert_similarity`` of every sparse layer of a model, by the layers' names.

    Args:
        dense: the model that was upcycled, or any dense one of the same architecture.

    Raises:
        ValueError: ``dense`` is not dense, or not of the same architecture.
    """
    layers = moe_layers(model)
    if dense is None:
        return {name: expert_similarity(layer) for name, layer in layers.items()}
    already = next(iter(moe_layers(dense)), None)
    if already is not None:
        raise ValueError(f"dense has a sparse layer ({already}); give the model that was upcycled, before it was")
    found = {}
    for name, layer in layers.items():
        try:
            found[name] = expert_similarity(layer, _dense_mlp(dense, name))
        except (TypeError, ValueError) as error:
            raise ValueError(f"dense is no model that the sparse one can come from: {name}: {error}") from error
    return found


def mean_cosine(cosines: Tensor) -> float:
    """The mean over all pairs of different experts of cosines [E, E]; NaN for a single expert."""
    pairs = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
    return pairs.double().mean().item()


def _dense_mlp(dense: nn.Module, name: str) -> DenseMLP:
    """The MLP of the innermost block of a dense model that the sparse layer ``name`` stands in."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            return find_mlp(dense.get_submodule(".".join(parts[:length]))).dense
        except (AttributeError, TypeError):
            continue
    raise ValueError("it has no block of that name with an MLP that is read")


def _check_shapes(layer: SparseMoE, dense: DenseMLP) -> None:
    pairs = {"in": (layer.in_weight, dense.in_weight), "gate": (layer.gate_weight, dense.gate_weight)}
    for which, (ours, theirs) in pairs.items():
        expert = None if ours is None else list(ours.shape[1:])
        mlp = None if theirs is None else list(theirs.shape)
        if expert != mlp:
            raise ValueError(f"{which}_weight of an expert is {expert}, of the dense MLP {mlp}; they must be alike")


def _first(in_weight: Tensor, gate_weight: Tensor | None) -> Tensor:
    """[E, features]."""
    matrices = [in_weight] if gate_weight is None else [in_weight, gate_weight]
    return torch.cat([matrix.flatten(1) for matrix in matrices], 1)


def _second(out_weight: Tensor) -> Tensor:
    return out_weight.flatten(1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """[E, F] between the rows of a [E, n] and b [F, n]."""
    return (F.normalize(a.float(), dim=1) @ F.normalize(b.to(a.device).float(), dim=1).T).cpu()
