"""What the ops return, and the activations that they know.

Axis legend, used in every shape of this package: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts,
``K`` choices a token, ``R = T*K`` rows (one a (token, choice) pair). Weights lie as in ``nn.Linear``: ``[E, out, in]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN_LAYOUT = "plain"
"""``PackedWeight.layout`` of a weight that lies as it did."""

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
MAX_EXPERTS = 1 << 20
"""Experts that a layer may have. What an op allocates grows with their number, so a slip is refused beyond this."""


class Gating(NamedTuple):
    """What a router decided for ``T`` tokens, before any capacity is applied."""

    gates: Tensor
    """[T, K] float32: weight of every choice, largest score first; 0 for tokens that take no part."""
    expert_indices: Tensor
    """[T, K] int32: expert of every choice; -1 for tokens that take no part."""
    top_prob: Tensor
    """[T] float32: the token's largest router probability (the key of batch-priority routing)."""
    mean_probs: Tensor
    """[E] float32: router probability averaged over the tokens that take part; 0 when there are none."""
    z_loss: Tensor
    """[] float32: mean of logsumexp(logits)^2 over the tokens that take part (ST-MoE, arXiv 2202.08906, eq. 5)."""
    tokens_per_expert: Tensor
    """[K, E] int32: how many tokens chose expert e as their k-th choice."""


class Plan(NamedTuple):
    """Which row of the expert-sorted order holds which (token, choice) pair.

    Rows of expert ``e`` are ``offsets[e]:offsets[e+1]``, in slot order: all first choices before any second choice,
    inside a choice by token position (or by priority). Rows from ``offsets[E]`` on are empty.
    """

    offsets: Tensor
    """[E+1] int32, ascending from 0."""
    choice_of_row: Tensor
    """[R] int32: ``t*K + k`` of the pair in this row; -1 from ``offsets[E]`` on."""
    row_of_choice: Tensor
    """[T, K] int32: row of the pair; -1 where it was dropped or the token takes no part."""


class PackedWeight(NamedTuple):
    """A weight in the order in which this CPU's kernels read it, from ``pack_weight``. It is for inference only.

    ``expert_mlp``, ``dense_mlp`` and ``grouped_linear`` take it in place of the weight, with bitwise the same results.
    It holds a copy: writing to the weight that it was made from does not change it. ``unpack_weight`` gives the weight
    back.
    """

    block: Tensor
    """uint8, as ``layout`` orders it; with layout "plain" the weight itself."""
    shape: tuple[int, ...]
    """Of the weight: [E, O, I], or [O, I] of one MLP."""
    dtype: torch.dtype
    """Of the weight. x must be of this type."""
    layout: str
    """What a word holds and how many columns a panel has, "float32x32" say: other CPUs have other panels. Or "plain"
    where no kernel here reads packed weights: float64, products that torch's matmul computes, an installation without
    the compiled extension."""

    @property
    def device(self) -> torch.device:
        return self.block.device

    @property
    def nbytes(self) -> int:
        """Bytes that it takes; twice the weight's where a 16-bit type is stored as float32."""
        return self.block.nbytes

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a PackedWeight has no attribute {name!r}: it is a weight of shape {list(self.shape)}, packed for "
            "inference. It cannot be trained or written to; clipup_kernels.unpack_weight() gives a copy as a tensor"
        )
