"""Losses of the sparse layers over all batches of an accumulated step.

With ``loss_scope="global_batch"`` a layer needs the counts of all batches before the first loss. Accumulation runs each
batch twice, first without gradients (GradCache), so the first passes count and the second passes use the sums::

    counting = StepCounting(model)
    for batch in batches:
        with torch.no_grad():
            model(*batch)
        counting.add()
    with counting.used():
        for batch in batches:
            ...  # forward and backward
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from .layer import moe_layers
from .layer_state import LastRouting
from .step_counts import StepCounts, over_ranks


class StepCounting:
    """Counts the choices of a step's batches, for the layers whose loss scope is the global batch."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in moe_layers(model).values() if layer.config.loss_scope == "global_batch"]
        self._counts: list[StepCounts] = []

    def add(self) -> None:
        """Adds the last forward pass of the calling thread."""
        last = [cast(LastRouting, layer.state.last_routing) for layer in self._layers]
        counts = [StepCounts.of_batch(routing.tokens_per_expert) for routing in last]
        self._counts = [a.plus(b) for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the losses of forward passes are those of one batch of the step. A collective."""
        for layer, counts in zip(self._layers, over_ranks(self._counts), strict=True):
            layer.state.step_counts = counts
        try:
            yield
        finally:
            for layer in self._layers:
                layer.state.step_counts = None
