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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..precision import check_device
from .objectives import is_using_distributed, world_info_from_env
from .options import TrainOptions
from .rank_watch import Place, RankLost, RankWatch

_NO_TIMEOUT = timedelta(days=365)
"""Of the process groups: ``RankWatch`` ends a run that waits in vain."""


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
        """Tells the other ranks. ``timed``: all ranks should come through it within options.dist_timeout."""
        if self.watch is not None:
            self.watch.at(Place(step, what, timed))

    def explained(self) -> AbstractContextManager:
        """Inside, the loss of another rank is raised as RankLost."""
        return nullcontext() if self.watch is None else self.watch.explained()

    def on_loss(self, last_words: Callable[[], str], log: Callable[[str], object]) -> None:
        """What ends the message of a lost rank, and where else than to stderr it goes."""
        if self.watch is not None:
            self.watch.last_words, self.watch.log = last_words, log

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks."""
        if not self.several:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if not self.several:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, elementwise."""
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

    def of_first(self, value: Any) -> Any:
        """Rank 0's value."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts while the others wait, however long it takes. All get what it returns, or the OSError or
        ValueError that it raises."""
        result, failure = None, None
        if self.first:
            try:
                result = action()
            except (OSError, ValueError) as error:
                failure = error
        result, failure = self.of_first((result, failure))
        if failure is not None:
            raise failure
        return result


@contextmanager
def joined(options: TrainOptions) -> Iterator[Ranks]:
    """The ranks that torchrun started, watched by each other. The processes stay connected until they end: parting and
    joining again, for a second run, is a race with ranks that are still parting.

    Raises:
        ValueError: the device is not there.
        RankLost: another rank did not come, died, froze or failed.
    """
    if not is_using_distributed():
        check_device(options.device)
        yield Ranks(torch.device(options.device))
        return
    watch, store = _meet(options.dist_timeout)
    with watch.run(options.dist_timeout):
        check_device(options.device)
        yield _connect(options.device, options.dist_backend, watch, store)


def failure_is_reported() -> bool:
    """Whether another rank was the first to report the failure of the last run."""
    return bool(_met) and _met[0][0].reported


_met: list[tuple[RankWatch, dist.Store]] = []
"""This process's place in the rendezvous, once there is one."""


def _meet(timeout: float) -> tuple[RankWatch, dist.Store]:
    if not _met:
        _, rank, world_size = world_info_from_env()
        try:
            store, rank, world_size = next(
                dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
            )
        except dist.DistError as error:
            reason = " ".join(str(error).split())
            raise RankLost(
                f"rank {rank} of {world_size} has not met the others within {timeout:g} s ({reason}); start all of "
                "them, or give them longer by --dist-timeout"
            ) from error
        watch = RankWatch(dist.PrefixStore("clipup", store.clone()), rank, world_size, timeout)
        atexit.register(watch.stop)
        _met.append((watch, store))
    return _met[0]


@functools.cache
def _connect(device: str, backend: str | None, watch: RankWatch, store: dist.Store) -> Ranks:
    target = torch.device(device)
    if target.type == "cuda":
        local_rank, _, _ = world_info_from_env()
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    backend = backend or ("nccl" if target.type == "cuda" else "gloo")
    rank, world_size = watch.rank, watch.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_NO_TIMEOUT)
    atexit.register(_leave, watch)
    return Ranks(target, rank, world_size, dist.new_group(backend="gloo", timeout=_NO_TIMEOUT), watch)


def _leave(watch: RankWatch) -> None:
    if not watch.failed:  # else it could wait for ranks that are gone
        dist.destroy_process_group()
