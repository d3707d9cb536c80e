"""The directories of sharded checkpoints.

    checkpoints/epoch_K/       after K whole epochs
    checkpoints/step_N/        after step N

A directory is written under a temporary name and gets its own when it is whole. ``state.pt`` in it is what a
single-file checkpoint holds besides tensors; ``optimizer`` in it is ``OptimizerValues``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open

from ...atomic_files import remove_directory, replace_files
from ...models.shard_files import INDEX, MODEL, OPTIMIZER, Index, check_files, read_index, read_tensors
from ...models.state_dicts import check_archive, read_pickle, write_pickle
from ..finite import not_finite

STATE = "state.pt"
_NAME = re.compile(r"(epoch|step)_\d+")
_STEP = re.compile(r"step_\d+")


class OptimizerValues(TypedDict):
    """What an optimizer holds besides tensors."""

    param_groups: list[dict[str, Any]]
    """The settings of its groups, and the names of their parameters in ``param_names``."""
    values: dict[str, dict[str, Any]]
    """By parameter and key; what ``is_plain`` accepts."""


def is_plain(value: object) -> bool:
    """Whether it can be a value of an optimizer: None, a number or a string."""
    return value is None or isinstance(value, int | float | str)


def directory_name(kept_as: str | None, step: int) -> str:
    """
    Args:
        kept_as: the file name of a full checkpoint in its place, if it is one that is kept.
    """
    return kept_as.removesuffix(".pt") if kept_as else f"step_{step}"


def is_name(name: str) -> bool:
    """Whether a sharded checkpoint may have this name."""
    return _NAME.fullmatch(name) is not None


def directories(folder: Path) -> list[Path]:
    """All that are named like sharded checkpoints, in no order."""
    try:
        return [path for path in folder.iterdir() if is_name(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_state(directory: Path) -> dict[str, Any]:
    """Its ``state.pt``.

    Raises:
        ValueError: it is missing or damaged.
        OSError: it could not be read.
    """
    path = directory / STATE
    if directory.is_dir() and not os.path.lexists(path):
        raise ValueError(f"{directory} is not a whole sharded checkpoint: {STATE} is missing")
    check_archive(path)
    return read_pickle(path)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Replaces its ``state.pt``."""
    replace_files({directory / STATE: lambda path: write_pickle(state, path)})


def check(directory: Path, rank: int = 0, world_size: int = 1) -> Index:
    """Reads the files that are this rank's to check, and compares them with their checksums.

    Raises:
        ValueError: one is missing or damaged, or holds values that are not finite.
        OSError: one could not be read.
    """
    index = read_index(directory)
    names = sorted(index.files)[rank::world_size]
    check_files(directory, index, names)
    for name in names:
        _check_finite(directory / name)
    return index


def _check_finite(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            broken = next(
                filter(None, (not_finite({name: file.get_tensor(name)}) for name in file.keys())),  # noqa: SIM118
                None,
            )
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if broken is not None:
        raise ValueError(f"{path} holds values that are not finite, in {broken}")


def load(directory: Path) -> dict[str, Any]:
    """Its state with all tensors: ``state_dict``, and ``optimizer`` as {"by_name": values by parameter and key}.

    Raises:
        ValueError: it is damaged, or holds values that are not finite.
        OSError: it could not be read.
    """
    index = check(directory)
    state = read_state(directory)
    by_name: dict[str, dict[str, Any]] = {}
    for name, value in read_tensors(directory, OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        by_name.setdefault(parameter, {})[key] = value
    for parameter, values in state["optimizer"]["values"].items():
        by_name.setdefault(parameter, {}).update(values)
    weights = read_tensors(directory, MODEL)
    return {**state, **index.configs, "state_dict": weights, "optimizer": {"by_name": by_name}}


def finish(aside: Path, target: Path, index: Index, state: dict[str, Any]) -> None:
    """Completes a directory whose tensors are written, and gives it its name."""
    (aside / INDEX).write_text(index.to_json(), encoding="utf-8")
    with open(aside / INDEX, "rb+") as file:
        os.fsync(file.fileno())
    write_state(aside, state)
    if target.exists():  # a damaged one
        remove_directory(target)
    aside.rename(target)


def is_between_epochs(path: Path) -> bool:
    """Whether it is named by its step."""
    return _STEP.fullmatch(path.name) is not None
