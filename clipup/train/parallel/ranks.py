"""The ranks of a run and what they tell each other: several processes under torchrun, or a single one.

Two groups connect the ranks. The computing group, torch's default one, has ``dist_timeout``: a rank that waits
longer in it fails, because another rank is frozen or gone. In the control group ranks wait for hours, for each other's
part of an evaluation. torchrun ends the other ranks of a node when one fails.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...precision import check_device
from .launched import WORLD_SIZE, Launched, first_set
from .options import ProcessOptions

_VOTE_SECONDS = 0.2
_CONTROL_TIMEOUT = timedelta(hours=4)
_BACKENDS = {"nccl": "cpu:gloo,cuda:nccl"}
"""The computing group also takes tensors on the CPU."""


class ElsewhereRaised(Exception):
    """Cause of an error that was raised, and is reported, on another rank."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. With one process every method is the identity."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    """A gloo group for messages, so they never wait for a GPU."""
    timeout: timedelta = timedelta()
    """Time that a rank waits in the computing group."""

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks ask within ``timeout``."""
        if not self.several:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def mean(self, values: Tensor) -> Tensor:
        """The elementwise mean over ranks."""
        if self.several:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's value, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def gather_patiently(self, value: Any) -> list[Any]:
        """``gather`` that waits for hours for a rank."""
        return self.gather(value, self.control)

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts while the others wait. Every rank gets what the action returns, or its error.

        The action runs in a thread and may take any time. Meanwhile all ranks vote on whether it has ended; a frozen
        rank does not vote.
        """
        if not self.several:
            return action()
        outcomes: list[Any] = []
        worker = threading.Thread(target=lambda: outcomes.append(_outcome(action)), daemon=True)
        if self.first:
            worker.start()
        while self.any(worker.is_alive()):
            if self.first:
                worker.join(_VOTE_SECONDS)
        outcomes = outcomes or [None]
        dist.broadcast_object_list(outcomes, src=0, device=torch.device("cpu"))
        return self._result(0, outcomes[0])

    def on_every(self, action: Callable[[], Any]) -> list[Any]:
        """Results of the action on every rank; the first error is raised on all ranks."""
        return [self._result(rank, outcome) for rank, outcome in enumerate(self.gather_patiently(_outcome(action)))]

    def _result(self, rank: int, outcome: Any) -> Any:
        result, error = outcome
        if error is None:
            return result
        if rank == self.rank:
            raise error
        raise error from ElsewhereRaised(f"on rank {rank}")


def _outcome(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


@contextmanager
def joined(options: ProcessOptions, device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started. The processes stay connected until they end, for further runs.

    Raises:
        ValueError: the device does not exist.
        ConnectionError: another rank did not start, died, failed, or has kept this one waiting for too long.
    """
    device = check_device(device)
    if first_set(WORLD_SIZE, 1) <= 1:
        alone = torch.device(device)
        if alone.type == "cuda" and alone.index is not None:
            torch.cuda.set_device(alone)  # what stages checkpoints waits for the current device
        yield Ranks(alone)
        return
    try:
        yield _connected(device, options.dist_backend, timedelta(seconds=options.dist_timeout))
    except BaseException as error:
        atexit.unregister(dist.destroy_process_group)  # with NCCL it would wait for the other ranks
        if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(
            f"another rank is lost, whose own message, if any, comes first ({error}). The last checkpoint is "
            "whole; continue with --resume latest"
        ) from error


def waiting_group() -> dist.ProcessGroup:
    """A new gloo group of all ranks with a timeout of hours. A collective."""
    return dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)


@functools.cache
def _connected(device: str, backend: str | None, timeout: timedelta) -> Ranks:
    local_rank, rank, world_size = Launched.from_environment()
    target = torch.device(device)
    if target.type == "cuda":
        target = torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each rank its own
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        backend = backend or ("nccl" if target.type == "cuda" else "gloo")
        dist.init_process_group(_BACKENDS.get(backend, backend), rank=rank, world_size=world_size, timeout=timeout)
        atexit.register(dist.destroy_process_group)
    return Ranks(target, rank, world_size, waiting_group(), timeout)
