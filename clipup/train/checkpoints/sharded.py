"""Sharded checkpoints: a directory in which each rank has written its part, by torch.distributed.checkpoint (DCP).

    checkpoints/epoch_K/       after K whole epochs
    checkpoints/step_N/        after step N

A directory is written under a temporary name and gets its own when it is whole. ``clipup.models.shard_files``
describes its files. Tensors have names that do not depend on how they are spread over ranks: ``model.NAME`` are weights
and buffers, ``optimizer.NAME.KEY`` the optimizer's of the parameter NAME. ``state.pt`` is what a single-file checkpoint
holds besides tensors; ``optimizer`` in it is the optimizer's state dict without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...atomic_files import remove_directory, replace_files
from ...models.shard_files import (
    INDEX,
    MODEL,
    OPTIMIZER,
    FileSum,
    Index,
    check_files,
    described,
    read_index,
    read_tensors,
    sum_of,
)
from ...models.state_dicts import check_archive, check_tensors, read_pickle, write_pickle
from ...moe.expert_parallel import is_distributed
from ..parallel.whole_state import by_name, load_optimizer_state

STATE = "state.pt"
NAME = re.compile(r"(epoch|step)_\d+")


def peek(directory: Path) -> dict[str, Any]:
    """The entries of a checkpoint besides tensors."""
    path = directory / STATE
    if not path.is_file():
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {STATE} is missing")
    check_archive(path)
    return read_pickle(path)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    replace_files({directory / STATE: lambda path: write_pickle(state, path)})


def read_share(directory: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Its state and configs without tensors. Compares the files that are this rank's to check with their checksums."""
    index = read_index(directory)
    check_files(directory, index, sorted(index.files)[rank::world_size])
    return peek(directory) | index.configs


def load(directory: Path) -> dict[str, Any]:
    """Its state with all tensors, as that of a single file."""
    state = read_share(directory)
    _add_tensors(state["optimizer"], read_tensors(directory, OPTIMIZER))
    return {**state, "state_dict": read_tensors(directory, MODEL)}


def _add_tensors(optimizer: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Adds tensors, named NAME.KEY, to an optimizer's state dict without them."""
    values = by_name(optimizer)
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        values[parameter][key] = value


def own_tensors(model: nn.Module, optimizer: dict[str, Any], is_first: bool) -> dict[str, Tensor]:
    """The tensors that this rank may have to write; they share the memory of the model and the optimizer. Plain
    tensors, which all ranks have, are written by the first rank.

    Args:
        optimizer: as ``optimizer_state`` returns it.
    """
    tensors = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    for name, values in by_name(optimizer).items():
        tensors |= {f"{OPTIMIZER}{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if is_first or is_distributed(value)}


def without_tensors(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict without tensors, the same on all ranks."""
    state = {
        index: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for index, values in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def write(
    tensors: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None, finish: Callable[..., None]
) -> None:
    """Writes tensors, which are on the CPU, into a directory. A collective if there is a group.

    Args:
        tensors: of this rank; a part of a tensor may be on one rank only. Equal parts are written by the first rank.
        finish: called on rank 0 with the checksums of all files when they are written.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    from torch.distributed import checkpoint as dcp  # takes seconds to import
    from torch.futures import Future

    class Writer(dcp.HuggingFaceStorageWriter):
        """Each rank writes one file, and sends its checksum to rank 0."""

        def write_data(self, plan: Any, planner: Any) -> Any:
            results = super().write_data(plan, planner).wait()
            names = {result.storage_data.relative_path for result in results}
            sums = {name: sum_of(directory / name) for name in names}
            done: Future[Any] = Future()
            done.set_result([dataclasses.replace(result, storage_data=sums) for result in results])
            return done

        def finish(self, metadata: Any, results: Any) -> None:
            written = [result.storage_data for of_rank in results for result in of_rank[:1]]
            finish({name: sums for of_rank in written for name, sums in of_rank.items()})

    writer = Writer(str(directory), save_distributed=True)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _causes_raised():
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)


def complete(aside: Path, target: Path, files: dict[str, FileSum], configs: dict[str, Any], state: Any) -> None:
    """Adds the state and the checksums to a directory whose tensors are written, and renames it to its final name,
    replacing a damaged directory of that name."""
    write_state(aside, state)
    index = Index(files, configs).to_json()
    replace_files({aside / INDEX: lambda path: path.write_text(index, encoding="utf-8")})
    if target.exists():
        remove_directory(target)
    aside.rename(target)


def restore(
    directory: Path,
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Reads its tensors, whatever their layout, into the model and the optimizer, whose state in the checkpoint is
    without them. An error is raised on all ranks."""
    from torch.distributed import checkpoint as dcp

    saved = described(directory)
    shapes = {
        name.removeprefix(MODEL): torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in saved.items()
        if name.startswith(MODEL)
    }
    check_tensors(model.state_dict(), shapes, str(directory))
    wanted = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    moments = {} if optimizer is None else _targets(optimizer, saved)
    wanted |= {f"{OPTIMIZER}{name}": value for name, value in moments.items()}
    with _causes_raised():
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    if optimizer is not None:
        _add_tensors(checkpoint["optimizer"], moments)
        load_optimizer_state(optimizer, model, checkpoint["optimizer"])


def _targets(optimizer: torch.optim.Optimizer, described: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors, named NAME.KEY, that the optimizer's are read into, spread like its parameters."""
    groups = optimizer.param_groups
    parameters = dict(pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True))
    targets = {}
    for name, tensor in described.items():
        held_of, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        if name.startswith(OPTIMIZER) and held_of in parameters:
            parameter, size = parameters[held_of].detach(), tensor.size
            is_array = size == parameter.shape != ()  # scalars, also of a scalar parameter, keep their type
            empty = torch.empty_like(parameter) if is_array else torch.empty(size, dtype=tensor.properties.dtype)
            targets[f"{held_of}.{key}"] = empty
    return targets


@contextmanager
def _causes_raised() -> Iterator[None]:
    """Raises the cause instead of DCP's exception, which ``except Exception`` does not catch."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error
