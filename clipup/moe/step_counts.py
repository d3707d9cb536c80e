"""Counts over all batches of a step, on other ranks or accumulated, which a layer's losses need."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class StepCounts(NamedTuple):
    """Over all batches of a step, which the loss scope ``global_batch`` averages over."""

    tokens_per_expert: Tensor
    """[K, E] float32: tokens whose k-th choice is expert e, before dropping."""
    batches: Tensor
    """[] float32: the number of batches, over ranks and accumulation."""

    @classmethod
    def of_batch(cls, tokens_per_expert: Tensor) -> StepCounts:
        return cls(tokens_per_expert.float(), torch.ones((), device=tokens_per_expert.device))

    def plus(self, other: StepCounts) -> StepCounts:
        return StepCounts(self.tokens_per_expert + other.tokens_per_expert, self.batches + other.batches)

    def weight_of(self, tokens_per_expert: Tensor) -> Tensor:
        """[] float32: the weight of a batch's average over its tokens, with which the mean over batches is the average
        over all tokens. tokens_per_expert: [K, E], those of the batch."""
        tokens = tokens_per_expert[0].sum().float()
        return tokens * self.batches / self.tokens_per_expert[0].sum().clamp_min(1)


def over_ranks(counts: list[StepCounts]) -> list[StepCounts]:
    """Sums over all ranks, with one collective."""
    if not (counts and dist.is_available() and dist.is_initialized()):
        return counts
    flat = torch.cat([torch.cat([each.tokens_per_expert.flatten(), each.batches[None]]) for each in counts])
    dist.all_reduce(flat)
    summed = flat.split([each.tokens_per_expert.numel() + 1 for each in counts])
    return [
        StepCounts(values[:-1].view_as(each.tokens_per_expert), values[-1])
        for each, values in zip(counts, summed, strict=True)
    ]
