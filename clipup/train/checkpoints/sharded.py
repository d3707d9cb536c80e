"""Sharded checkpoints: a directory in which each rank has written its part, by torch.distributed.checkpoint (DCP).

    checkpoints/epoch_K/       after K whole epochs
    checkpoints/step_N/        after step N

A directory is written under a temporary name and gets its own when it is whole. ``clipup.models.shard_files``
describes its files. Tensors have names that do not depend on how they are spread over ranks: ``model.NAME`` are weights
and buffers, ``optimizer.NAME.KEY`` the optimizer's of the parameter NAME. ``state.pt`` is what a single-file checkpoint
holds besides tensors; ``optimizer`` in it has the settings of the groups with their ``param_names``, and under
``values`` what the optimizer holds of a parameter besides tensors.
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
from ...models.state_dicts import check_archive, read_pickle, write_pickle
from ...moe.expert_parallel import is_distributed
from ..optim import continued_groups
from ..ranks.whole_state import PLACE

STATE = "state.pt"
NAME = re.compile(r"(epoch|step)_\d+")


def read_state(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        ValueError: it is missing or damaged.
        OSError: it could not be read.
    """
    path = directory / STATE
    if not path.is_file():
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {STATE} is missing")
    check_archive(path)
    return read_pickle(path)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    replace_files({directory / STATE: lambda path: write_pickle(state, path)})


def check(directory: Path, rank: int = 0, world_size: int = 1) -> Index:
    """Compares the files that are this rank's to check with their checksums.

    Raises:
        ValueError: one is missing or damaged.
        OSError: one could not be read.
    """
    index = read_index(directory)
    check_files(directory, index, sorted(index.files)[rank::world_size])
    return index


def load(directory: Path) -> dict[str, Any]:
    """Its state with all tensors: ``state_dict``, and ``optimizer`` as {"by_name": values by parameter and key}.

    Raises:
        ValueError: it is damaged.
        OSError: it could not be read.
    """
    index, state = check(directory), read_state(directory)
    by_name: dict[str, dict[str, Any]] = {name: dict(held) for name, held in state["optimizer"]["values"].items()}
    for name, value in read_tensors(directory, OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        by_name.setdefault(parameter, {})[key] = value
    return {**state, **index.configs, "state_dict": read_tensors(directory, MODEL), "optimizer": {"by_name": by_name}}


def shapes(directory: Path) -> dict[str, Tensor]:
    """The weights as tensors without memory."""
    return {
        name.removeprefix(MODEL): torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in described(directory).items()
        if name.startswith(MODEL)
    }


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Names by parameter. Call it before the first step: FSDP2 exchanges the parameters of modules meanwhile."""
    return {parameter: name for name, parameter in model.named_parameters()}


def own_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[Tensor, str], is_first: bool
) -> dict[str, Tensor]:
    """The tensors that this rank may have to write, which share the memory of the model and the optimizer. Of plain
    ones, which all ranks have, the first rank's count."""
    found = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    for parameter, values in optimizer.state.items():
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        found |= {f"{OPTIMIZER}{names[parameter]}.{key}": value for key, value in tensors.items()}
    return {name: value for name, value in found.items() if is_first or is_distributed(value)}


def optimizer_values(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    """What the optimizer holds besides tensors, the same on all ranks."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", *PLACE)}
        groups.append({**settings, "param_names": [names[parameter] for parameter in group["params"]]})
    values = {
        names[parameter]: {key: value for key, value in held.items() if not isinstance(value, Tensor)}
        for parameter, held in optimizer.state.items()
    }
    return {"param_groups": groups, "values": values}


def write(
    tensors: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None, finish: Callable[..., None]
) -> None:
    """Writes tensors, which are on the CPU, into a directory. A collective if there is a group.

    Args:
        tensors: what this rank holds: a part of a name may be on one rank only. Of equal parts the first rank's counts.
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
    """Adds the state and the checksums to a directory whose tensors are written, and gives it its name."""
    write_state(aside, state)
    index = Index(files, configs).to_json()
    replace_files({aside / INDEX: lambda path: path.write_text(index, encoding="utf-8")})
    rename(aside, target)


def rename(path: Path, target: Path) -> Path:
    """Gives a checkpoint a name, which a damaged one may have."""
    if target.exists():
        remove_directory(target)
    return path.rename(target)


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    values: dict[str, Any],
    directory: Path,
    group: dist.ProcessGroup | None,
) -> None:
    """Puts the tensors of a checkpoint, whatever its layout, into the model, which has these weights, and the
    optimizer, if there is one, with its other ``values``. A collective if there is a group.

    Raises:
        OSError: on all ranks, if one of them could not read.
    """
    from torch.distributed import checkpoint as dcp

    wanted = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    state = {} if optimizer is None else _optimizer_targets(model, optimizer, values, described(directory), wanted)
    with _causes_raised():
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    if optimizer is not None:
        optimizer.load_state_dict(state)


def _optimizer_targets(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    described: dict[str, Any],
    wanted: dict[str, Tensor],
) -> dict[str, Any]:
    """A state dict of the optimizer, whose tensors are still to be read and are added to ``wanted``."""
    names = parameter_names(model)
    keys: dict[str, list[str]] = {}
    for name in described:
        if name.startswith(OPTIMIZER):
            parameter_name, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            keys.setdefault(parameter_name, []).append(key)
    state: dict[int, dict[str, Any]] = {}
    for group, own in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        for parameter, number in zip(group["params"], own["params"], strict=True):
            held = dict(saved["values"].get(names[parameter], {}))
            for key in keys.get(names[parameter], ()):
                name = f"{OPTIMIZER}{names[parameter]}.{key}"
                size, dtype = described[name].size, described[name].properties.dtype
                like_parameter = key != "step" and size == parameter.shape
                held[key] = wanted[name] = (
                    torch.empty_like(parameter.detach()) if like_parameter else torch.empty(size, dtype=dtype)
                )
            if held:
                state[number] = held
    return {"state": state, "param_groups": continued_groups(optimizer, names, saved["param_groups"])}


@contextmanager
def _causes_raised() -> Iterator[None]:
    """Raises what happened in place of DCP's exception, which ``except Exception`` does not catch."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error
