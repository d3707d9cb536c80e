"""Process ranks and the collectives the trainer needs: data parallelism under torchrun, or a single process."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...precision import check_device
from ..options import TrainOptions
from .launched import DISTRIBUTED, Launched, first_set
from .rank_watch import Activity, RankLost, RankWatch

_NO_TIMEOUT = timedelta(days=365)
"""For the process groups: ``RankWatch`` ends a run whose ranks wait in vain."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. With one process every method is the identity."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    """A gloo group for control messages, so they never wait for a GPU."""
    watch: RankWatch | None = None

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def doing(self, what: str, step: int, timed: bool = False) -> None:
        """Tells the other ranks. ``timed``: all ranks should finish it within options.dist_timeout."""
        if self.watch is not None:
            self.watch.doing(Activity(step, what, timed))

    def rank_lost_explained(self) -> AbstractContextManager:
        """Inside, the loss of another rank is raised as RankLost."""
        return nullcontext() if self.watch is None else self.watch.explained()

    def on_loss(self, advice: Callable[[], str], log: Callable[[str], object]) -> None:
        """How the message about a lost rank ends, and where it goes besides stderr."""
        if self.watch is not None:
            self.watch.advice, self.watch.log = advice, log

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if not self.several:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def mean(self, values: Tensor) -> Tensor:
        """The elementwise mean over ranks."""
        if self.several:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Waits for all ranks, however long it takes."""
        self.gather(None)

    def of_first(self, value: Any) -> Any:
        """Rank 0's value."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts while the others wait, however long it takes. Every rank gets what the action returns, or the
        OSError, ValueError or ImportError that it raises."""
        result, failure = None, None
        if self.first:
            try:
                result = action()
            except (OSError, ValueError, ImportError) as error:
                failure = error
        result, failure = self.of_first((result, failure))
        if failure is not None:
            raise failure
        return result


@contextmanager
def joined(options: TrainOptions) -> Iterator[Ranks]:
    """The ranks that torchrun started, watching each other. The processes stay connected until they end: to disconnect
    and connect again, for a second run, would be a race with ranks that are still disconnecting.

    Raises:
        ValueError: there is no such device.
        RankLost: another rank did not start, died, froze or failed.
    """
    if first_set(DISTRIBUTED, 1) <= 1:
        yield Ranks(torch.device(check_device(options.device)))
        return
    watch, store = _meet(options.dist_timeout)
    with watch.run(options.dist_timeout):
        yield _connect(check_device(options.device), options.dist_backend, watch, store)


def unlimited_group() -> dist.ProcessGroup:
    """Another gloo group of all ranks, for a thread that meets those of the other ranks. A collective."""
    return dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)


def failure_is_reported() -> bool:
    """Whether another rank was first to report the failure of the last run, and prints its message."""
    return bool(_met) and _met[0][0].reported


_met: list[tuple[RankWatch, dist.Store]] = []
"""This process's watch and rendezvous store, once it has met the other ranks."""


def _meet(timeout: float) -> tuple[RankWatch, dist.Store]:
    if not _met:
        _, rank, world_size = Launched.from_environment()
        try:
            store, rank, world_size = next(
                dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
            )
        except dist.DistError as error:
            reason = " ".join(str(error).split())
            raise RankLost(
                f"rank {rank} of {world_size} has not met the others within {timeout:g} s ({reason}); start all of "
                "them, or set a longer --dist-timeout"
            ) from error
        watch = RankWatch(dist.PrefixStore("clipup", store.clone()), rank, world_size, timeout)
        atexit.register(watch.stop)
        _met.append((watch, store))
    return _met[0]


@functools.cache
def _connect(device: str, backend: str | None, watch: RankWatch, store: dist.Store) -> Ranks:
    target = torch.device(device)
    if target.type == "cuda":
        target = torch.device("cuda", Launched.from_environment().local_rank)
        torch.cuda.set_device(target)
    backend = backend or ("nccl" if target.type == "cuda" else "gloo")
    rank, world_size = watch.rank, watch.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_NO_TIMEOUT)
    atexit.register(_leave, watch)
    return Ranks(target, rank, world_size, unlimited_group(), watch)


def _leave(watch: RankWatch) -> None:
    if not watch.failed:  # after a failure it could wait for ranks that are gone
        dist.destroy_process_group()
