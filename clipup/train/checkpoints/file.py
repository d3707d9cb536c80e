"""Checkpoints as single files, in open_clip's format.

A file holds open_clip's dictionary, and what an exact resume needs. open_clip's keys are epoch, name, state_dict,
optimizer and scaler. The others are the fields of ``position.RunState``, ``conditions`` (what the position depends on:
``resume``), and the model's ``model_cfg``, ``moe_cfg``, ``preprocess_cfg`` and ``tokenizer_files``
(``clipup.models.tokenizers``). A file appears whole or not at all.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...atomic_files import replace_files
from ...models.state_dicts import check_archive, check_tensors, read_pickle, strip_wrapper_prefixes, write_pickle
from ..parallel.whole_state import load_optimizer_state, load_weights

LATEST = "epoch_latest.pt"
NAME = re.compile(r"epoch_(\d+|latest)\.pt")
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
    """The error for a checkpoint that could not be written; it names the file and says what to do."""
    return OSError(
        f"could not write the checkpoint {path}: {error}; those that were written before are whole. Free some space, "
        "then continue with --resume latest"
    )


def peek(path: Path) -> dict[str, Any]:
    """The position in a checkpoint."""
    check_archive(path, suffix="data.pkl")
    return read_pickle(path, mmap=True)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, ours or open_clip_train's."""
    check_archive(path)
    state = read_pickle(path)
    if missing := [key for key in _REQUIRED if key not in state]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, so it is not a checkpoint of a run; to start from weights alone "
            "use --pretrained"
        )
    state["state_dict"] = strip_wrapper_prefixes(state["state_dict"])
    return state


def read_share(path: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The whole checkpoint, on every rank."""
    return load(path)


def restore(
    path: Path,
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Loads a checkpoint's tensors into the model and the optimizer."""
    check_tensors(model.state_dict(), checkpoint["state_dict"], str(path))
    load_weights(model, checkpoint["state_dict"])
    if optimizer is not None:
        load_optimizer_state(optimizer, model, checkpoint["optimizer"])
