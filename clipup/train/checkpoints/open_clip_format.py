"""Checkpoints of a run as files: writing, reading, finding and deleting them.

A file holds open_clip's dictionary, and what an exact resume needs. open_clip's keys are epoch, name, state_dict,
optimizer and scaler. The others are ``step`` (optimizer steps done), ``step_of_epoch`` (those of the current epoch, 0
at its start), ``steps_before``, ``samples_seen``, ``conditions`` (what these numbers depend on:
``clipup.train.resume``), ``validated`` (step and numbers of the last validation), ``evaluations`` (records so far),
``skipped_steps``,
``skipped_samples``, ``seconds``, ``model_cfg``, ``moe_cfg``, ``preprocess_cfg``, ``tokenizer_files``
(``clipup.models.tokenizers``), and ``finished`` (the model directory is written too). A file appears whole or not at
all. Sharded checkpoints (``sharded``) are directories beside these files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...atomic_files import remove_directory, replace_files
from ...models import factory, tokenizers
from ...models.state_dicts import check_archive, check_fit, read_pickle, strip_wrapper_prefixes, write_pickle
from ..ranks.whole_state import load_weights
from . import sharded

LATEST = "epoch_latest.pt"
_FILE = re.compile(r"epoch_(\d+|latest)\.pt")
_REQUIRED = ("epoch", "state_dict", "optimizer")


def save(state: dict[str, Any], *paths: Path) -> None:
    """Writes a checkpoint under one or more names in a directory.

    Raises:
        OSError: it could not be written; the files that had these names before are whole.
    """
    first, *others = paths
    try:
        replace_files({first: lambda path: write_pickle(state, path)})
        for other in others:
            replace_files({other: lambda path: shutil.copyfile(first, path)})
    except OSError as error:
        raise not_written(first, error) from error


def not_written(path: Path, error: OSError) -> OSError:
    """The error of a checkpoint that could not be written, with its name and what to do."""
    return OSError(
        f"could not write the checkpoint {path}: {error}; those that were written before are whole. Free some space, "
        "then continue with --resume latest"
    )


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or open_clip_train's, onto the CPU. Nothing in it is executed.

    Raises:
        ValueError: it is not a checkpoint, holds only weights, or is damaged.
        OSError: there is no such file, or it could not be read.
    """
    path = Path(path)
    if path.is_dir():
        return sharded.load(path)
    check_archive(path)
    state = read_pickle(path)
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so it is not a checkpoint of a run; to start from weights alone "
            "use --pretrained"
        )
    state["state_dict"] = strip_wrapper_prefixes(state["state_dict"])
    return state


class Newest(NamedTuple):
    """The checkpoint to continue from."""

    path: Path
    state: dict[str, Any]
    passed_over: list[str] = []
    """Why newer ones were not used."""


def newest(
    directory: Path,
    load: Callable[[Path], dict[str, Any]] = load,
    found: tuple[list[tuple[tuple[int, int, bool], Path]], list[str]] | None = None,
) -> Newest | None:
    """The checkpoint with the most steps of those in a directory that ``load`` accepts; None if there is none.

    Args:
        found: what ``in_order`` says of the directory, if that is known.

    Raises:
        ValueError: there are checkpoints, and none of them can be used.
        OSError: one could not be read, which does not mean that it is damaged.
    """
    usable, unusable = found or in_order(directory)
    for _, path in reversed(usable):
        try:
            return Newest(path, load(path), unusable)
        except ValueError as error:
            unusable.append(str(error))
    if unusable:
        raise ValueError(
            f"there are checkpoints in {directory}, but none can be used: {'; '.join(unusable)}. Restore one from a "
            "copy, or start from the beginning with --force instead of --resume"
        )
    return None


def all_in(directory: Path) -> list[Path]:
    """All that are checkpoints by name and kind, in no order."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return [path for path in paths if (sharded.NAME if path.is_dir() else _FILE).fullmatch(path.name)]


def _position(path: Path) -> tuple[int, int, bool]:
    """Orders the checkpoints of a run: its step (-1 for one of open_clip_train), its epoch, and whether the run is
    finished. Tensors are not read."""
    if path.is_dir():
        state = sharded.read_state(path)
    else:
        check_archive(path, suffix="data.pkl")
        state = read_pickle(path, mmap=True)
    return state.get("step", -1), state.get("epoch", -1), state.get("finished") is True


def in_order(directory: Path) -> tuple[list[tuple[tuple[int, int, bool], Path]], list[str]]:
    """The checkpoints in a directory, the newest last, and why others have no position."""
    found, unusable = [], []
    for path in all_in(directory):
        try:
            found.append((_position(path), path))
        except ValueError as error:
            unusable.append(str(error))
    return sorted(found), unusable


def check_is_newest(checkpoint: Path) -> None:
    """Refuses to continue a run from a checkpoint that others beside it come after. Those that cannot be read do not
    count: ``newest`` passes over them too.

    Raises:
        FileExistsError: one comes after it.
        ValueError, OSError: it could not be read.
    """
    at = _position(checkpoint)
    position, newest = in_order(checkpoint.parent)[0][-1]
    if position[:2] > at[:2]:
        raise FileExistsError(
            f"the checkpoint {checkpoint} was written at step {at[0]}, and its run has gone on: {newest.name} was "
            f"written at step {position[0]}. Continue the run with --resume latest, which passes over damaged "
            f"checkpoints, or choose another --name to train on from {checkpoint.name}"
        )


def prune(newest: Path, limit: int | None) -> None:
    """Deletes older checkpoints than this one, except for the ``limit`` newest of all; with None those that are named
    by their step. ``epoch_latest.pt`` and damaged ones are left alone.

    Raises:
        OSError: one could not be read or deleted.
    """
    found, _ = in_order(newest.parent)
    last = _position(newest)
    older = [path for position, path in found if position <= last and path != newest and path.name != LATEST]
    if limit is None:
        old = [path for path in older if path.name.startswith("step_")]
    else:
        old = older[: max(len(older) - (limit - (newest.name != LATEST)), 0)]
    for path in old:
        delete(path)


def delete(path: Path) -> None:
    """Deletes a checkpoint, or another part of a run, if it is there."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)


def check_configs(
    model: nn.Module, configs: dict[str, Any], tokenizer_files: dict[str, bytes] | None, source: str | Path
) -> None:
    """Compares a model with that of a checkpoint, whose weights may fit a model that computes something else.

    Args:
        configs: of the checkpoint. tokenizer_files: of the model's tokenizer, if they are known.

    Raises:
        ValueError: it computes something else, or was trained with another tokenizer.
    """
    factory.check_configs(model, configs, source)
    trained = tokenizers.saved_in(configs, source)
    if trained is not None and tokenizer_files is not None and trained != tokenizer_files:
        raise ValueError(f"{source} was trained with another tokenizer than that of the model; restore its files")


def restore(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies a checkpoint's weights into the model.

    Raises:
        ValueError: they are of another model; the model is unchanged.
    """
    check_fit(model, weights, str(source))
    load_weights(model, weights)
