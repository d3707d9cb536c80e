"""Checkpoints of a run: open_clip's dictionary, and what an exact resume needs.

open_clip's keys are epoch, name, state_dict, optimizer and scaler. Beside them: ``step`` (optimizer steps done),
``step_of_epoch`` (those of the epoch that is under way, 0 at its start), ``seconds``, ``rng`` (a state a rank),
``model_cfg`` and ``moe_cfg``. A file appears whole or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import replace_files
from ..weights import read_pickle, unwrapped

LATEST = "epoch_latest.pt"
_REQUIRED = ("epoch", "state_dict", "optimizer")


def epoch_name(epoch: int) -> str:
    """The kept checkpoint after ``epoch`` whole epochs."""
    return f"epoch_{epoch}.pt"


def save(state: dict[str, Any], *paths: Path) -> None:
    """Writes a checkpoint under one or more names of a directory; the bytes lie on the disk once.

    Raises:
        OSError: it could not be written; what was under these names before is whole.
    """
    first, *others = paths
    try:
        replace_files({first: lambda path: _write(state, path)})
        for other in others:
            replace_files({other: lambda path: _link_or_copy(first, path)})
    except OSError as error:
        before = newest(first.parent)
        whole = f"{before} is whole" if before else "there is no earlier one"
        raise OSError(
            f"could not write the checkpoint {first}: {error}; {whole}. Make room, then go on with --resume latest"
        ) from error


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # so torch's archive writer ends when it cannot write; the cause is in the context
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours or of open_clip_train, on the CPU. Nothing in it is executed.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint, or weights alone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    state = read_pickle(Path(path))
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so it is no checkpoint of a run; to start from weights alone use "
            "--pretrained"
        )
    state["state_dict"] = unwrapped(state["state_dict"])
    return state


def newest(directory: Path) -> Path | None:
    """The readable checkpoint of a directory with the most steps; None when there is none."""
    best, most = None, (-1, -1)
    for path in sorted(directory.glob("epoch_*.pt")):
        if not re.fullmatch(r"epoch_(\d+|latest)\.pt", path.name):
            continue
        try:
            state = read_pickle(path, mmap=True)
        except ValueError:
            continue
        done = (state.get("step", -1), state.get("epoch", -1))
        if done >= most:
            best, most = path, done
    return best


def restore(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies a checkpoint's weights into the model.

    Raises:
        ValueError: they are of another model; the model is as it was.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    shapes = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    faults = [
        f"{names[0]} (of {len(names)}) is {fault}"
        for names, fault in ((missing, "missing"), (unknown, "unknown to the model"))
        if names
    ]
    if shapes:
        there, here = list(weights[shapes[0]].shape), list(expected[shapes[0]].shape)
        faults.append(f"{shapes[0]} (of {len(shapes)}) is {there} in the checkpoint and {here} in the model")
    if faults:
        raise ValueError(
            f"the checkpoint {source} is of another model: {'; '.join(faults)}. Give the options (--model, --moe) that "
            "it was trained with"
        )
    model.load_state_dict(weights)
