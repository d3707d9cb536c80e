"""The checkpoints in a run's directory: finding, ordering and deleting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...atomic_files import remove_directory
from .file import LATEST
from .format import format_of, load

Position = tuple[int, int, bool]
"""Orders the checkpoints of a run: its step (-1 for one of open_clip_train), its epoch, and whether the run is
finished."""


class Newest(NamedTuple):
    """The checkpoint to continue from."""

    path: Path
    state: dict[str, Any]
    passed_over: list[str] = []
    """Why newer checkpoints were not used."""


def newest(
    directory: Path,
    load: Callable[[Path], dict[str, Any]] = load,
    listed: tuple[list[tuple[Position, Path]], list[str]] | None = None,
) -> Newest | None:
    """The checkpoint with the most steps of those in a directory that ``load`` accepts; None if there is none.

    Args:
        listed: the result of ``in_order`` for the directory, if that is known.

    Raises:
        ValueError: there are checkpoints, and none of them can be used.
        OSError: a checkpoint could not be read; it may still be intact.
    """
    usable, unusable = listed or in_order(directory)
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
    """Paths in a directory that are checkpoints by name and kind, in no order."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return [path for path in paths if format_of(path).NAME.fullmatch(path.name)]


def _position(path: Path) -> Position:
    state = format_of(path).peek(path)
    return state.get("step", -1), state.get("epoch", -1), state.get("finished") is True


def in_order(directory: Path) -> tuple[list[tuple[Position, Path]], list[str]]:
    """The checkpoints in a directory, the newest last, and why others have no position."""
    usable, unusable = [], []
    for path in all_in(directory):
        try:
            usable.append((_position(path), path))
        except ValueError as error:
            unusable.append(str(error))
    return sorted(usable), unusable


def check_is_newest(checkpoint: Path) -> None:
    """Refuses to continue a run from a checkpoint if its directory holds later checkpoints. Unreadable checkpoints do
    not count: ``newest`` passes over them too.

    Raises:
        FileExistsError: a later checkpoint exists.
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
    """Deletes checkpoints older than ``newest``, except for the ``limit`` newest of all; with None it deletes those
    named by their step. ``epoch_latest.pt`` and damaged checkpoints are left alone.

    Raises:
        OSError: a checkpoint could not be read or deleted.
    """
    usable, _ = in_order(newest.parent)
    last = _position(newest)
    older = [path for position, path in usable if position <= last and path != newest and path.name != LATEST]
    old = (
        [path for path in older if path.name.startswith("step_")]
        if limit is None
        else older[: max(len(older) - (limit - (newest.name != LATEST)), 0)]
    )
    for path in old:
        delete(path)


def delete(path: Path) -> None:
    """Deletes a checkpoint, or another part of a run, if it is there."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)
