"""Options of how a model is divided over ranks; ``clipup.train.ranks.parallel`` does it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...checks import check
from .group import OptionGroup

_OF_FSDP = ("fsdp_replicas", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu")


@dataclass(kw_only=True)
class ParallelOptions(OptionGroup):
    """How several ranks divide a model (docs/distributed.md)."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the ranks (FSDP2) instead of replicating them (DDP)."""
    fsdp_replicas: int = 1
    """Copies of a model sharded with fsdp: the ranks form that many groups, and each group holds a whole one (HSDP)."""
    fsdp_no_reshard_after_forward: bool = False
    """Keep a block's gathered weights from its forward to its backward pass: less communication, more memory."""
    fsdp_offload_cpu: bool = False
    """Keep the shards of weights, gradients and optimizer state in the CPU's memory."""
    ep: int = 1
    """Expert parallelism: ranks over which each layer's experts are divided; tokens travel to the ranks of their
    experts. It divides the number of experts and of ranks."""

    def check(self) -> None:
        for name in ("fsdp_replicas", "ep"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        defaults = {field.name: field.default for field in dataclasses.fields(ParallelOptions)}
        for name in _OF_FSDP:
            if getattr(self, name) != defaults[name] and not self.fsdp:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without fsdp; set it too")

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all weights, so that all ranks must run the same forward passes."""
        return self.fsdp or self.ep > 1
