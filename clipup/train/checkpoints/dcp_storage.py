"""Writes and reads the tensors of sharded checkpoints with torch.distributed.checkpoint (DCP), as safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...models.shard_files import FileSum, sum_of

Group = dist.ProcessGroup | None
"""A gloo group of all ranks; None for a single process."""


def save(
    tensors: dict[str, Tensor], directory: Path, group: Group, finish: Callable[[dict[str, FileSum]], None]
) -> None:
    """Writes tensors, which are on the CPU, into a directory. A collective if there is a group.

    Args:
        tensors: what this rank holds: a part of a name may be on one rank only. Of equal parts the first rank's counts.
        finish: called on rank 0 with the checksums of all files when they are written.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _Unwrapped():
        writer = _Writer(directory, finish)
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)


def load(tensors: dict[str, Tensor], directory: Path, group: Group) -> None:
    """Reads into tensors, the same names on all ranks. A collective if there is a group.

    Raises:
        OSError: on all ranks, if one of them could not read.
    """
    with _Unwrapped():
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


class _Unwrapped:
    """Raises what happened in place of DCP's exception, which ``except Exception`` does not catch."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, CheckpointException):
            return
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


class _Writer(dcp.HuggingFaceStorageWriter):
    """Each rank writes one file, and sends its checksum to rank 0."""

    def __init__(self, directory: Path, finish: Callable[[dict[str, FileSum]], None]) -> None:
        super().__init__(str(directory), save_distributed=True)
        self._finish = finish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        files = {result.storage_data.relative_path for result in results}
        sums = {name: sum_of(Path(self.path) / name) for name in files}
        done: Future[list[WriteResult]] = Future()
        done.set_result([dataclasses.replace(result, storage_data=sums) for result in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result.storage_data for of_rank in results for result in of_rank[:1]]
        self._finish({name: sums for of_rank in written for name, sums in of_rank.items()})
