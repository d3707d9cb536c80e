"""The interface of checkpoint formats, and the format of a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from . import file, sharded


class Format(Protocol):
    """A module that reads checkpoints of one format. Nothing in them is executed.

    Its functions raise ValueError for a file that is not a checkpoint, holds only weights, or is damaged, and OSError
    for what could not be read.
    """

    NAME: re.Pattern[str]
    """Matches the names of checkpoints in a run's directory."""

    def peek(self, path: Path) -> dict[str, Any]:
        """The position, without tensors being read."""

    def load(self, path: Path) -> dict[str, Any]:
        """The whole checkpoint, on the CPU."""

    def read_share(self, path: Path, rank: int, world_size: int) -> dict[str, Any]:
        """The entries that a rank needs to restore a run. Checks the rank's share of the files."""

    def restore(
        self,
        path: Path,
        checkpoint: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Puts the tensors of a checkpoint that was read into the model, and the optimizer if it is given. A collective
        if there is a group. Raises ValueError, with the model unchanged, if the weights are of another model."""


def format_of(path: Path) -> Format:
    return sharded if path.is_dir() else file


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or open_clip_train's, sharded or not.

    Raises:
        ValueError: it is not a checkpoint, holds only weights, or is damaged.
        OSError: the file does not exist, or could not be read.
    """
    return format_of(Path(path)).load(Path(path))
