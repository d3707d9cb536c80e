"""Ranks: who am I, and what do all of us say. Plain data parallelism under torchrun, or a single process."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..evaluate.precision import check_device
from .openclip import init_distributed_device_so, is_using_distributed
from .options import TrainOptions


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. With one process every method is the identity."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    """A gloo group for small talk between hosts, which does not wait for a GPU."""

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

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
        """Rank 0 acts while the others wait. All get what it returns, or the OSError or ValueError that it raises."""
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


def connect(options: TrainOptions) -> Ranks:
    """Joins the ranks that torchrun started. The process stays joined until it ends: parting and joining again, for a
    second run, is a race with ranks that are still parting.

    Raises:
        ValueError: the device is not there.
    """
    check_device(options.device)
    if not is_using_distributed():
        return Ranks(torch.device(options.device))
    return Ranks(*_join(options.device, options.dist_backend))


@functools.cache
def _join(device: str, backend: str | None) -> tuple[torch.device, int, int, Any]:
    found = init_distributed_device_so(device, dist_backend=backend)
    atexit.register(dist.destroy_process_group)
    return torch.device(found["device"]), found["global_rank"], found["world_size"], dist.new_group(backend="gloo")
