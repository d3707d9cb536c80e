"""Checkpoints of a run: open_clip's dictionary, and what an exact resume needs.

open_clip's keys are epoch, name, state_dict, optimizer and scaler. The others are ``step`` (optimizer steps done),
``step_of_epoch`` (those of the current epoch, 0 at its start), ``steps_before``, ``samples_seen``, ``conditions`` (what
these numbers depend on: ``clipup.train.resume``), ``validated`` (step and numbers of the last validation),
``evaluations`` (records so far), ``skipped_steps``, ``skipped_samples``, ``seconds``, ``model_cfg``, ``moe_cfg``,
``preprocess_cfg``, ``tokenizer_files`` (``clipup.pretrained.tokenizers``), and ``finished`` (the model directory is
written too). A file appears whole or not at all. Sharded checkpoints (``clipup.train.sharded_checkpoints``) are
directories beside these files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..atomic_files import remove_directory, replace_files
from ..pretrained.state_dicts import check_archive, read_pickle, strip_wrapper_prefixes, write_pickle
from . import sharded_checkpoints
from .checkpoint_contents import check_contents
from .finite import not_finite, tensors_of
from .whole_state import load_weights

LATEST = "epoch_latest.pt"
_NAME = re.compile(r"epoch_(\d+|latest)\.pt")
_REQUIRED = ("epoch", "state_dict", "optimizer")


def epoch_name(epoch: int) -> str:
    """The kept checkpoint after ``epoch`` whole epochs."""
    return f"epoch_{epoch}.pt"


def save(state: dict[str, Any], *paths: Path) -> None:
    """Writes a checkpoint under one or more names in a directory; the names share one copy on the disk.

    Raises:
        OSError: it could not be written; the files that had these names before are whole.
    """
    first, *others = paths
    try:
        replace_files({first: lambda path: write_pickle(state, path)})
        for other in others:
            replace_files({other: lambda path: _link_or_copy(first, path)})
    except OSError as error:
        there = [path for path in _files(first.parent) if path.exists()]  # and no link to nowhere
        before = max(there, key=lambda path: path.stat().st_mtime, default=None)
        whole = f"{before} is whole" if before else "there is no earlier one"
        raise OSError(
            f"could not write the checkpoint {first}: {error}; {whole}. Free some space, then continue with "
            "--resume latest"
        ) from error


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or open_clip_train's, onto the CPU. Nothing in it is executed.

    The ``optimizer`` of a sharded one is {"by_name": values by parameter and key}.

    Raises:
        ValueError: it is not a checkpoint, holds only weights, is damaged, or holds values that are not finite.
        OSError: there is no such file, or it could not be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return sharded_checkpoints.load(path)
        check_archive(path)
        state = read_pickle(path)
    except OSError as error:
        raise _unread(path, error) from error
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so it is not a checkpoint of a run; to start from weights alone "
            "use --pretrained"
        )
    check_contents(state, path)
    broken = not_finite(tensors_of(state["state_dict"], state["optimizer"]))
    if broken is not None:
        raise ValueError(f"{path} holds values that are not finite, in {broken}")
    state["state_dict"] = strip_wrapper_prefixes(state["state_dict"])
    return state


def load_share(directory: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Checks the files of a sharded checkpoint that are this rank's to check, and reads its state.

    Raises:
        ValueError: it is damaged, or holds values that are not finite.
        OSError: it could not be read.
    """
    try:
        sharded_checkpoints.check(directory, rank, world_size)
        return sharded_checkpoints.read_state(directory)
    except OSError as error:
        raise _unread(directory, error) from error


class Newest(NamedTuple):
    """The checkpoint to continue from."""

    path: Path
    state: dict[str, Any]
    passed_over: list[str]
    """Why newer ones were not used."""


def newest(directory: Path) -> Newest | None:
    """The checkpoint with the most steps of those in a directory that ``load`` accepts; None if there is none.

    Raises:
        ValueError: there are checkpoints, and none of them can be used.
        OSError: one could not be read, which does not mean that it is damaged.
    """
    return first_usable(directory, *candidates(directory), load)


def first_usable(
    directory: Path, paths: list[Path], unusable: list[str], load: Callable[[Path], dict[str, Any]]
) -> Newest | None:
    """The first of these checkpoints that ``load`` accepts, with the errors of those before, after ``unusable``.

    Raises:
        ValueError: there are some, or unusable ones, and none can be used.
    """
    unusable = list(unusable)
    for path in paths:
        try:
            return Newest(path, load(path), unusable)
        except ValueError as error:
            unusable.append(str(error))
    if unusable:
        raise ValueError(f"there are checkpoints in {directory}, but none can be used: {'; '.join(unusable)}")
    return None


def candidates(directory: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints by their steps, most first, and why others cannot be used; tensors are not looked at.

    Raises:
        OSError: one could not be read, which does not mean that it is damaged.
    """
    found, unusable = _positions(directory)
    return [path for _, path in sorted(found, reverse=True)], unusable


def _positions(directory: Path) -> tuple[list[tuple[Position, Path]], list[str]]:
    """Of all checkpoints in a directory, and why others have none."""
    found, unusable = [], []
    for path in sorted(held_in(directory)):
        try:
            found.append((_position(path), path))
        except FileNotFoundError:
            if path.is_symlink():
                raise
            continue  # a run that is still training has removed it
        except ValueError as error:
            unusable.append(str(error))
    return found, unusable


def prune(newest: Path, limit: int | None) -> None:
    """Deletes older checkpoints than this one, except for the ``limit`` newest of all; with None those that are named
    by their step. ``epoch_latest.pt`` and damaged ones are left alone.

    Raises:
        OSError: one could not be deleted.
    """
    found = []
    for path in held_in(newest.parent):
        with suppress(ValueError, OSError):
            if path.name != LATEST:
                found.append((_position(path), path))
    last = _position(newest)
    older = [path for position, path in sorted(found) if position <= last and path != newest]
    if limit is None:
        old = [path for path in older if sharded_checkpoints.is_between_epochs(path)]
    else:
        old = older[: max(len(older) - (limit - (newest.name != LATEST)), 0)]
    for path in old:
        delete(path)


class Position(NamedTuple):
    """Orders the checkpoints of a run, the newest last."""

    step: int
    """-1 for one of open_clip_train."""
    epoch: int
    finished: bool = False
    """Of one step, that of the finished run comes last."""

    def __str__(self) -> str:
        return f"step {self.step}" if self.step >= 0 else f"epoch {self.epoch}"


def held_in(directory: Path) -> list[Path]:
    """All that are checkpoints by name and kind, links to nowhere among them, in no order.

    Raises:
        OSError: the directory is a link to nowhere, or could not be read.
    """
    try:
        paths = list(directory.iterdir())
    except FileNotFoundError as error:
        if directory.is_symlink():
            raise _unread(directory, error) from error
        return []
    except NotADirectoryError:
        return []
    return [
        path
        for path in paths
        if _NAME.fullmatch(path.name)
        or (sharded_checkpoints.is_name(path.name) and (path.is_dir() or not path.exists()))
    ]


def check_is_newest(checkpoint: Path) -> None:
    """Refuses to continue a run from a checkpoint that others beside it come after.

    Those of which not even the position can be read do not count: ``newest`` passes over them too.

    Raises:
        FileExistsError: one comes after it.
        ValueError, OSError: it, or one that may come after it, could not be read.
    """
    at = _position(checkpoint)
    found, _ = _positions(checkpoint.parent)
    position, newest = max(found)
    if position[:2] > at[:2]:
        raise FileExistsError(
            f"the checkpoint {checkpoint} was written at {at}, and its run has gone on: {newest.name} was written at "
            f"{position}. Continue the run with --resume latest, which passes over damaged checkpoints, or choose "
            f"another --name to train on from {checkpoint.name}"
        )


def delete(path: Path) -> None:
    """Deletes a checkpoint, if there is one."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)


def _files(directory: Path) -> list[Path]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [directory / name for name in names if _NAME.fullmatch(name)]


def _position(path: Path) -> Position:
    """Without reading tensors."""
    try:
        if path.is_dir():
            state = sharded_checkpoints.read_state(path)
        else:
            check_archive(path, suffix="data.pkl")
            state = read_pickle(path, mmap=True)
    except OSError as error:
        raise _unread(path, error) from error
    step, epoch = state.get("step", -1), state.get("epoch", -1)
    if not (isinstance(step, int) and isinstance(epoch, int)):
        raise ValueError(f"{path} is not a checkpoint of a run: its step and epoch are {step!r}, {epoch!r}")
    return Position(step, epoch, state.get("finished") is True)


def _unread(path: Path, error: OSError) -> OSError:
    """The same error with its consequence for a run."""
    away = any(one.is_symlink() and not one.exists() for one in (path, path.parent))
    if isinstance(error, FileNotFoundError) and not away:
        return FileNotFoundError(f"there is no checkpoint {path}")
    return type(error)(
        f"the checkpoint {path} could not be read: {error.strerror or error}. It may be intact, so no other checkpoint "
        "is used in its place. Try again when the file system answers",
    )


def restore(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies a checkpoint's weights into the model.

    Raises:
        ValueError: they are of another model; the model is unchanged.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    check_model(model, shapes, source)
    load_weights(model, weights)


def check_model(model: nn.Module, weights: dict[str, tuple[int, ...]], source: str | Path) -> None:
    """
    Args:
        weights: the shapes of a checkpoint's weights by name.

    Raises:
        ValueError: they are of another model.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    shapes = [name for name in expected if name in weights and weights[name] != tuple(expected[name].shape)]
    faults = [
        f"{names[0]} (of {len(names)}) is {fault}"
        for names, fault in ((missing, "missing"), (unknown, "unknown to the model"))
        if names
    ]
    if shapes:
        there, here = list(weights[shapes[0]]), list(expected[shapes[0]].shape)
        faults.append(f"{shapes[0]} (of {len(shapes)}) is {there} in the checkpoint and {here} in the model")
    if faults:
        raise ValueError(
            f"the checkpoint {source} is of another model: {'; '.join(faults)}. Use the options (--model, --moe) that "
            "it was trained with"
        )
