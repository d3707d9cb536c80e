"""The results of the ops, and the activations that they support.

Axis legend, used in every shape of this package: ``T`` tokens, ``D`` model width, ``H`` hidden width, ``E`` experts,
``K`` choices per token, ``R = T*K`` rows (one per (token, choice) pair). Weights have the layout of ``nn.Linear``:
``[E, out, in]``.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

PLAIN_LAYOUT = "plain"
"""``PackedWeight.layout`` of a weight that is not packed."""
Quantization = Literal["int8"]
QUANTIZATIONS = get_args(Quantization)
"""How ``pack_weight`` can quantize a weight."""


@functools.cache
def quantization_of(layout: str) -> str | None:
    """The quantization of a ``PackedWeight.layout``; None: its elements are exact."""
    return next((name for name in QUANTIZATIONS if layout.startswith(name)), None)


ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""Activations of experts: ``z Phi(z)`` by erf, its tanh approximation, ``z sigmoid(1.702 z)`` (OpenAI's CLIP),
``max(z, 0)``, ``z sigmoid(z)``. csrc/moe.h has the same list, and the extension is refused if the two differ."""
MAX_EXPERTS = 1 << 20
"""Experts that a layer may have. Ops allocate memory in proportion to it, so larger numbers are refused as mistakes."""


def type_name(dtype: torch.dtype) -> str:
    """For example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


class Gating(NamedTuple):
    """The router's choices for ``T`` tokens, before any capacity is applied."""

    gates: Tensor
    """[T, K] float32: weight of every choice, largest score first; 0 for masked tokens."""
    expert_indices: Tensor
    """[T, K] int32: expert of every choice; -1 for masked tokens."""
    top_prob: Tensor
    """[T] float32: the token's largest router probability (the priority of batch-priority routing)."""
    mean_probs: Tensor
    """[E] float32: router probability averaged over the unmasked tokens; 0 if there are none."""
    z_loss: Tensor
    """[] float32: mean of logsumexp(logits)^2 over the unmasked tokens (ST-MoE, arXiv 2202.08906, eq. 5)."""
    tokens_per_expert: Tensor
    """[K, E] int32: how many tokens chose expert e as their k-th choice."""


class Plan(NamedTuple):
    """Which row holds which (token, choice) pair, with rows sorted by expert.

    Rows of expert ``e`` are ``offsets[e]:offsets[e+1]``, in slot order: all first choices before any second choice,
    inside a choice by token position (or by priority). Rows from ``offsets[E]`` on are empty.
    """

    offsets: Tensor
    """[E+1] int32, ascending from 0."""
    choice_of_row: Tensor
    """[R] int32: ``t*K + k`` of the pair in this row; -1 from ``offsets[E]`` on."""
    row_of_choice: Tensor
    """[T, K] int32: row of the pair; -1 if it was dropped or the token is masked."""


class RoutingBlocks(NamedTuple):
    """The routing that ``clipup::packed_sparse_mlp`` returns, in two blocks: tensors of their own would take longer to
    make than a few tokens take to route."""

    floats: Tensor
    """float32: logits [T, E], and Gating's gates, top_prob, mean_probs and z_loss, one after the other."""
    ints: Tensor
    """int32: Gating's expert_indices and tokens_per_expert, Plan's offsets, choice_of_row and row_of_choice."""
    num_tokens: int
    num_experts: int
    k: int

    @staticmethod
    def sizes(num_tokens: int, num_experts: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of elements in both blocks."""
        rows = num_tokens * k
        floats = (num_tokens * num_experts, rows, num_tokens, num_experts, 1)
        return floats, (rows, k * num_experts, num_experts + 1, rows, rows)

    def unpack(self) -> tuple[Tensor, Gating, Plan]:
        """The logits, gating and plan, as views."""
        of_token, of_choice = (self.num_tokens, self.num_experts), (self.num_tokens, self.k)
        sizes = self.sizes(self.num_tokens, self.num_experts, self.k)
        logits, gates, top_prob, mean_probs, z_loss = self.floats.split(sizes[0])
        experts, tokens_per_expert, offsets, choice_of_row, row_of_choice = self.ints.split(sizes[1])
        counts = tokens_per_expert.view(self.k, self.num_experts)
        gating = Gating(gates.view(of_choice), experts.view(of_choice), top_prob, mean_probs, z_loss.view(()), counts)
        return logits.view(of_token), gating, Plan(offsets, choice_of_row, row_of_choice.view(of_choice))


class PackedWeight(NamedTuple):
    """A weight packed for this CPU's kernels by ``pack_weight``, for inference only.

    ``expert_mlp``, ``dense_mlp`` and ``grouped_linear`` take it instead of the weight, with bitwise the same results
    unless it is quantized. It holds a copy: writing to the original weight does not change it. ``unpack_weight``
    returns the weight.
    """

    block: Tensor
    """uint8, in the order of ``layout``; with layout "plain" a copy of the weight."""
    shape: tuple[int, ...]
    """Shape of the weight: [E, O, I], or [O, I] for one MLP."""
    dtype: torch.dtype
    """Type of the weight, and of x."""
    layout: str
    """Word type and columns of a panel, for example "float32x32"; other CPUs have other panels. "plain" if no kernel
    here reads packed weights: float64, products computed by torch's matmul, no compiled extension. "int8x4x32": words
    of four int8, scales and sums of output channels (csrc/moe.h)."""

    @property
    def device(self) -> torch.device:
        return self.block.device

    @property
    def quantization(self) -> str | None:
        """ "int8" if the weight is quantized."""
        return quantization_of(self.layout)

    @property
    def nbytes(self) -> int:
        """Size in bytes; twice the weight's if a 16-bit type is stored as float32."""
        return self.block.nbytes

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a PackedWeight has no attribute {name!r}: it is a weight of shape {list(self.shape)}, packed for "
            "inference. It cannot be trained or written to; clipup_kernels.unpack_weight() gives a copy as a tensor"
        )
