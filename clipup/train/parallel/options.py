"""Options of the processes of a run, and of how they divide a model."""

from __future__ import annotations

from dataclasses import dataclass

from ...option_group import OptionGroup, Resumed, option

_UNSHARDED = {"without --fsdp": lambda group: not group.fsdp}


@dataclass(kw_only=True)
class ProcessOptions(OptionGroup):
    """Runs of several processes, under torchrun."""

    dist_backend: str | None = option(None, Resumed.FREE)
    """torch.distributed backend under torchrun. None: nccl on CUDA, gloo on CPU."""
    dist_timeout: float = option(1800.0, Resumed.FREE, positive=True)
    """With several ranks: seconds that a rank waits for the others within a step before the run ends. Evaluations and
    checkpoints may take longer."""


@dataclass(kw_only=True)
class ParallelOptions(OptionGroup):
    """How several ranks divide a model (docs/distributed.md)."""

    fsdp: bool = option(False, Resumed.FREE)
    """Shard weights, gradients and optimizer state over the ranks (FSDP2) instead of replicating them (DDP)."""
    fsdp_replicas: int = option(1, Resumed.FREE, least=1, idle=_UNSHARDED)
    """Copies of a model sharded with fsdp: the ranks form that many groups, and each group holds a whole one (HSDP)."""
    fsdp_no_reshard_after_forward: bool = option(False, Resumed.FREE, idle=_UNSHARDED)
    """Keep a block's gathered weights from its forward to its backward pass: less communication, more memory."""
    fsdp_offload_cpu: bool = option(False, Resumed.FREE, idle=_UNSHARDED)
    """Keep the shards of weights, gradients and optimizer state in the CPU's memory."""
    ep: int = option(1, Resumed.FREE, least=1)
    """Expert parallelism: ranks over which each layer's experts are divided; tokens travel to the ranks of their
    experts. It divides the number of experts and of ranks."""

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all weights, so that all ranks must run the same forward passes."""
        return self.fsdp or self.ep > 1
