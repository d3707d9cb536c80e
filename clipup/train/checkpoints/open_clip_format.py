"""Checkpoints of a run: open_clip's dictionary, and what an exact resume needs.

open_clip's keys are epoch, name, state_dict, optimizer and scaler. The others are ``step`` (optimizer steps done),
``step_of_epoch`` (those of the current epoch, 0 at its start), ``steps_before``, ``samples_seen``, ``conditions`` (what
these numbers depend on: ``clipup.train.resume``), ``validated`` (step and numbers of the last validation),
``evaluations`` (records so far), ``skipped_steps``, ``skipped_samples``, ``seconds``, ``model_cfg``, ``moe_cfg``,
``preprocess_cfg``, ``tokenizer_files`` (``clipup.models.tokenizers``), and ``finished`` (the model directory is
written too). A file appears whole or not at all. Sharded checkpoints (``sharded_checkpoints``) are
directories beside these files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...atomic_files import remove_directory, replace_files
from ...models import factory, tokenizers
from ...models.state_dicts import check_archive, read_pickle, strip_wrapper_prefixes, write_pickle
from ..finite import not_finite, tensors_of
from ..ranks.whole_state import load_weights
from . import sharded_checkpoints

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
        raise OSError(
            f"could not write the checkpoint {first}: {error}; those that were written before are whole. Free some "
            "space, then continue with --resume latest"
        ) from error


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file names the checkpoint."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(f"the checkpoint {path} could not be read: {error}. It may be intact") from error
        raise


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or open_clip_train's, onto the CPU. Nothing in it is executed.

    The ``optimizer`` of a sharded one is {"by_name": values by parameter and key}.

    Raises:
        ValueError: it is not a checkpoint, holds only weights, is damaged, or holds values that are not finite.
        OSError: there is no such file, or it could not be read.
    """
    path = Path(path)
    with errors_named(path):
        if path.is_dir():
            return sharded_checkpoints.load(path)
        check_archive(path)
        state = read_pickle(path)
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so it is not a checkpoint of a run; to start from weights alone "
            "use --pretrained"
        )
    broken = not_finite(tensors_of(state["state_dict"], state["optimizer"]))
    if broken is not None:
        raise ValueError(f"{path} holds values that are not finite, in {broken}")
    state["state_dict"] = strip_wrapper_prefixes(state["state_dict"])
    return state


def check_optimizer(state: dict[str, Any], path: str | Path) -> None:
    """
    Raises:
        ValueError: the checkpoint holds weights alone.
    """
    if not state["optimizer"]:
        raise ValueError(
            f"{path} holds no state of an optimizer to go on with; start from its weights: clipup convert makes a "
            "model directory of it for --model"
        )


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
        raise ValueError(
            f"there are checkpoints in {directory}, but none can be used: {'; '.join(unusable)}. Restore one from a "
            "copy, or start from the beginning with --force in place of --resume"
        )
    return None


def candidates(directory: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints by their steps, most first, and why others cannot be used; tensors are not looked at.

    Raises:
        OSError: one could not be read, which does not mean that it is damaged.
    """
    found, unusable = _positions(directory)
    return [path for _, path in reversed(found)], unusable


def _positions(directory: Path) -> tuple[list[tuple[Position, Path]], list[str]]:
    """Of all checkpoints in a directory, the newest last, and why others have none."""
    found, unusable = [], []
    for path in held_in(directory):
        try:
            found.append((_position(path), path))
        except FileNotFoundError:  # unless it is a link, a run that is still training has removed it
            if path.is_symlink():
                raise
        except ValueError as error:
            unusable.append(str(error))
    return sorted(found), unusable


def prune(newest: Path, limit: int | None) -> None:
    """Deletes older checkpoints than this one, except for the ``limit`` newest of all; with None those that are named
    by their step. ``epoch_latest.pt`` and damaged ones are left alone.

    Raises:
        OSError: one could not be read or deleted.
    """
    found, _ = _positions(newest.parent)
    last = _position(newest)
    older = [path for position, path in found if position <= last and path != newest and path.name != LATEST]
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
    """All that are checkpoints by name and kind, links to nowhere among them, in no order."""
    if not directory.is_dir():
        return []
    return [
        path
        for path in directory.iterdir()
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
    position, newest = found[-1]
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


def _position(path: Path) -> Position:
    """Without reading tensors."""
    with errors_named(path):
        if path.is_dir():
            state = sharded_checkpoints.read_state(path)
        else:
            check_archive(path, suffix="data.pkl")
            state = read_pickle(path, mmap=True)
    return Position(state.get("step", -1), state.get("epoch", -1), state.get("finished") is True)


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
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differing = [name for name in expected | weights if expected.get(name) != weights.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint {source} is of another model: {len(differing)} tensors differ, the first is {name}, of "
            f"shape {weights.get(name)} in the checkpoint and {expected.get(name)} in the model. Use the options "
            "(--model, --moe) that it was trained with"
        )
