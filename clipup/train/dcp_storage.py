"""Storage for torch.distributed.checkpoint (DCP) in the format of ``clipup.pretrained.shard_files``.

DCP plans which rank writes and reads which part of a tensor. Its own storage keeps the plan as a pickle, which could
execute code when it is read; this one keeps it as JSON.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..pretrained.shard_files import Entry, FileSum, Index, Part, PartFiles, part_name, write_parts

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

Group = dist.ProcessGroup | None
"""A gloo group of all ranks; None for a single process."""


def save(tensors: dict[str, Tensor], directory: Path, group: Group, finish: Callable[[Index], None]) -> None:
    """Writes tensors, which are on the CPU, into a directory. A collective if there is a group.

    Args:
        tensors: what this rank writes: a part of a name may be on one rank only.
        finish: called on rank 0 with the index (without configs) when all ranks have written.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    with _Unwrapped():
        dcp.save(tensors, storage_writer=_Writer(directory, finish), process_group=group, no_dist=group is None)


def load(tensors: dict[str, Tensor], directory: Path, index: Index, group: Group) -> None:
    """Reads into tensors, the same names on all ranks. A collective if there is a group.

    Raises:
        OSError: on all ranks, if one of them could not read.
    """
    with _Unwrapped():
        dcp.load(tensors, storage_reader=_Reader(directory, index), process_group=group, no_dist=group is None)


class _Unwrapped:
    """Raises what happened in place of DCP's exception, which ``except Exception`` does not catch."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, CheckpointException):
            return
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


class _Writer(StorageWriter):
    """Each rank writes one file."""

    def __init__(self, directory: Path, finish: Callable[[Index], None]) -> None:
        self.directory = directory
        self._finish = finish

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, f"rank_{rank}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {_name_of(item): item for item in plan.items if math.prod(_data_of(item).chunk.sizes)}
        parts = {name: (_data_of(item).properties.dtype, _data_of(item).chunk.sizes) for name, item in items.items()}
        done: Future[list[WriteResult]] = Future()
        results = []
        if items:
            file = plan.storage_data
            sums = write_parts(self.directory / file, parts, lambda name: _tensor(planner.resolve_data(items[name])))
            results = [WriteResult(item.index, 0, (file, sums)) for item in items.values()]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, FileSum] = {}
        parts: dict[str, list[Part]] = {}
        for result in (one for of_rank in results for one in of_rank):
            file, sums = result.storage_data
            files[file] = sums
            name, index = result.index.fqn, result.index.index
            chunk = _described(metadata, name).chunks[index or 0]
            parts.setdefault(name, []).append(Part(tuple(chunk.offsets), tuple(chunk.sizes), file))
        entries = {}
        for name in metadata.state_dict_metadata:
            tensor = _described(metadata, name)
            entries[name] = Entry(tensor.properties.dtype, tuple(tensor.size), tuple(parts.get(name, ())))
        self._finish(Index(entries, files, {}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class _Reader(StorageReader):
    """Each rank reads the boxes that it needs."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        for name, entry in self.index.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)) for part in entry.parts]
            described[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = PartFiles(self.directory)
        for item, part in sorted(((item, self._part(item)) for item in plan.items), key=lambda one: one[1].file):
            name = item.storage_index.fqn
            box = files.read(name, self.index.tensors[name], part, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(box)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, item: ReadItem) -> Part:
        offsets = tuple(item.storage_index.offset or ())
        return next(part for part in self.index.tensors[item.storage_index.fqn].parts if part.offsets == offsets)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _data_of(item: WriteItem) -> Any:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor, so a sharded checkpoint cannot hold it")
    return item.tensor_data


def _name_of(item: WriteItem) -> str:
    data = _data_of(item)
    return part_name(item.index.fqn, data.size, data.chunk.offsets, data.chunk.sizes)


def _tensor(data: Any) -> Tensor:
    return data.cpu()


def _described(metadata: Metadata, name: str) -> TensorStorageMetadata:
    described = metadata.state_dict_metadata[name]
    assert isinstance(described, TensorStorageMetadata)  # _data_of
    return described
