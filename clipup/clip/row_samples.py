"""A random sample of the rows that layers see while a model runs on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RowSample:
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


@contextmanager
def calls_observed(observers: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    """Inside, every call of a module first calls its observer with the module, the positional arguments and those by
    name."""
    hooks = [module.register_forward_pre_hook(observer, with_kwargs=True) for module, observer in observers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_batch(model: nn.Module, batch: Tensor | Iterable[Tensor | None] | Mapping[str, Any]) -> None:
    """Calls a model with a tensor, with several (None at the end is left out), or with arguments by name. They go to
    the model's device, those of floats to its type."""
    first = next(model.parameters())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(first.device, first.dtype if value.is_floating_point() else None)

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    else:
        parts = [batch] if isinstance(batch, Tensor) else [*batch]
        while parts and parts[-1] is None:
            parts.pop()
        model(*map(moved, parts))
