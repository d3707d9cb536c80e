"""The layer that is measured: its shape, its weights and inputs, and the routing that these make."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTINGS = ("balanced", "skewed")


class Case(NamedTuple):
    """One layer on one batch of tokens."""

    tokens: int
    d_model: int
    d_hidden: int
    experts: int = 8
    routing: str = "balanced"
    """balanced: every expert is as likely as the others; skewed: expert 0 is every token's first choice."""


class Weights(NamedTuple):
    router: Tensor  # [E, D]
    in_weight: Tensor  # [E, H, D]
    in_bias: Tensor  # [E, H]
    out_weight: Tensor  # [E, D, H]
    out_bias: Tensor  # [E, D]
    top_k: int

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self[:-1]


class DenseWeights(NamedTuple):
    in_weight: Tensor  # [H, D]
    in_bias: Tensor  # [H]
    out_weight: Tensor  # [D, H]
    out_bias: Tensor  # [D]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self)


def make_weights(case: Case, top_k: int, dtype: torch.dtype, device: str = "cpu") -> Weights:
    """Random parameters; the router makes the case's routing on inputs of ``make_x``."""
    experts, width, hidden = case.experts, case.d_model, case.d_hidden
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((experts, width), (experts, hidden, width), (experts, hidden), (experts, width, hidden), (experts, width))
    tensors = [torch.randn(size, generator=generator, device=device) / size[-1] ** 0.5 for size in sizes]
    if case.routing == "skewed":  # logits of 2 for expert 0 through x's first feature, of 0 +- 0.1 for the others
        tensors[0] *= 0.1
        tensors[0][:, 0] = 0
        tensors[0][0, 0] = 2
    return Weights(*(t.to(dtype).requires_grad_() for t in tensors), top_k)


def first_expert(weights: Weights) -> DenseWeights:
    """The first expert as a dense MLP, in tensors of its own: its backward writes the gradients of one expert only."""
    return DenseWeights(*(t[0].detach().clone().requires_grad_() for t in weights[1:5]))


def make_x(tokens: int, d_model: int, dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    """Random tokens [T, D]; their first feature is 1."""
    x = torch.randn(tokens, d_model, generator=torch.Generator(device).manual_seed(seed), device=device)
    x[:, 0] = 1
    return x.to(dtype).requires_grad_()


@torch.no_grad()
def without_close_calls(x: Tensor, w: Weights, gap: float = 0.02) -> Tensor:
    """The tokens whose last choice is ahead of the next expert by ``gap``: no rounding of logits chooses otherwise."""
    best = F.linear(x.float(), w.router.float()).topk(min(w.top_k + 1, len(w.router))).values
    clear = best[:, w.top_k - 1] - best[:, -1] >= gap if best.shape[1] > w.top_k else torch.ones_like(x[:, 0]).bool()
    return x[clear].detach().requires_grad_()


def route(x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Gates and experts [T, K]: softmax over all experts, the K best, renormalised."""
    probs = F.linear(x.float(), w.router.float()).softmax(-1)
    gates, experts = probs.topk(w.top_k)
    return gates / gates.sum(-1, keepdim=True), experts


def expert_loads(x: Tensor, w: Weights) -> list[int]:
    """Rows of every expert."""
    return torch.bincount(route(x, w)[1].flatten(), minlength=w.router.shape[0]).tolist()


def check_loads(case: Case, x: Tensor, w: Weights) -> None:
    """Raises unless the router does what the case says: skewed gives expert 0 half of all rows."""
    loads = expert_loads(x, w)
    if case.routing == "skewed" and 2 * loads[0] != sum(loads):
        raise ValueError(f"skewed routing gave expert 0 {loads[0]} of {sum(loads)} rows, not half: --top-k must be 2")
