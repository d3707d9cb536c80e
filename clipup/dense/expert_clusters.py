"""Initial experts from clusters of the MLPs' inputs (cluster-aware initialization, arXiv 2604.13508).

Axis legend: ``N`` tokens, ``D`` model width, ``E`` experts, ``I`` inputs and ``O`` outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clipup_kernels.reference import activate

MAX_ROUNDS = 100
"""Rounds of k-means, which usually ends much earlier, when no token changes its cluster."""


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


def reduce_to_clusters(
    experts: Mapping[str, Tensor], rows: Tensor, owner: Tensor, energy: float, activation: str, ln_eps: float
) -> dict[str, list[int]]:
    """Lets each matrix of an expert keep what it does to the expert's cluster (``reduced_matrix``), in place.

    Args:
        experts: the parameters of ``Experts`` by name, each [E, ...]. rows: [N, D] on the CPU; owner: [N], the expert
            of each row. energy: as in ``reduced_matrix``.

    Returns:
        By matrix (``in_weight``, ...) the rank that each expert keeps.
    """
    ranks: dict[str, list[int]] = {}

    def reduced_linear(name: str, expert: int, inputs: Tensor) -> Tensor:
        """The outputs of an expert's matrix after its reduction, with its bias."""
        stacked, bias = experts[f"{name}_weight"], experts.get(f"{name}_bias")
        weight, rank = reduced_matrix(stacked[expert].float().cpu(), inputs, energy)
        stacked[expert] = weight.to(stacked)
        ranks.setdefault(f"{name}_weight", []).append(rank)
        return F.linear(inputs, weight, None if bias is None else bias[expert].float().cpu())

    for expert in range(len(experts["in_weight"])):
        x = rows[owner == expert]
        hidden = reduced_linear("in", expert, x)
        hidden = (
            activate(reduced_linear("gate", expert, x), activation) * hidden
            if "gate_weight" in experts
            else activate(hidden, activation)
        )
        if "ln_weight" in experts:
            weight, bias = (experts[name][expert].float().cpu() for name in ("ln_weight", "ln_bias"))
            hidden = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, ln_eps)
        reduced_linear("out", expert, hidden)
    return ranks


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
    # X^T X = V diag(values) V^T, so W X^T has the squares of W V sqrt(values)
    values, vectors = torch.linalg.eigh(second)
    left, sizes, _ = torch.linalg.svd(wide @ (vectors * values.clamp_min(0).sqrt()), full_matrices=False)
    share = sizes.square().cumsum(0)
    if share[-1] == 0:  # no input, or only zeros: nothing says what to keep
        return weight, full
    rank = min(int((share < energy * share[-1]).sum()) + 1, full)
    kept = left[:, :rank]
    return (kept @ (kept.T @ wide)).to(weight.dtype), rank
