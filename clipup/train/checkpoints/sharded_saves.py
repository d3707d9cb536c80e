"""Saving sharded checkpoints while the training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...atomic_files import make_aside, remove_aside
from ...models.shard_files import FileSum
from ..log.recorder import LOG
from ..ranks.distributed import Ranks, waiting_group
from . import sharded
from .open_clip_format import not_written

_VOTE_SECONDS = 0.5
"""How often ranks that wait for a checkpoint tell each other that they do."""


class ShardedSaves:
    """Each rank copies its share of the tensors into the CPU's memory, and a thread writes the copy.

    The threads of the ranks meet in a process group of their own. They do not keep a process from ending, as those of
    DCP's ``async_save`` do: one that waits for a frozen rank would. The methods are collectives.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        configs: dict[str, Any],
        saved: Callable[[Path], None],
    ) -> None:
        """
        Args:
            configs: what ``Index.configs`` should be.
            saved: called with a checkpoint that is whole, on every rank in its thread.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.folder, self.model, self.optimizer, self.ranks = folder, model, optimizer, ranks
        self.configs, self.saved = configs, saved
        self.last: tuple[Path, int] | None = None
        """The last checkpoint that is whole, and its step."""
        self._names = sharded.parameter_names(model)
        self._group = waiting_group() if ranks.several else None
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Starts to write a checkpoint, after the one before is whole. Returns its path.

        If that is of the same step, its tensors are the same, and only the state is replaced.

        Raises:
            OSError: the one before could not be written, or this one not started.
        """
        self.wait()
        state = {**state, "optimizer": sharded.optimizer_values(self.optimizer, self._names)}
        target = self.folder / name
        last, step = self.last or (target, -1)
        if step == state["step"]:
            target = self.ranks.first_does(lambda: _renewed(last, target, state))
            self.last = target, step
            self.saved(target)
            return target
        aside = self.ranks.first_does(lambda: make_aside(self.folder))
        tensors = sharded.own_tensors(self.model, self.optimizer, self._names, self.ranks.first)
        staged: Any = self._stager.stage(tensors)
        arguments = staged, aside, target, state
        self._thread = threading.Thread(target=self._write, args=arguments, name="clipup checkpoint", daemon=True)
        self._thread.start()
        return target

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole.

        Raises:
            OSError: it could not be written.
            RuntimeError: another rank was lost.
        """
        while self.ranks.any(self._thread is not None and self._thread.is_alive()):  # a frozen rank does not vote
            if self._thread is not None:
                self._thread.join(_VOTE_SECONDS)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, staged: Any, aside: Path, target: Path, state: dict[str, Any]) -> None:
        def finish(files: dict[str, FileSum]) -> None:
            sharded.complete(aside, target, files, self.configs, state)

        try:
            sharded.write(staged, aside, self._group, finish)
        except OSError as error:
            self._failure = not_written(target, error)
            if self.ranks.first:
                LOG.warning("%s", self._failure)
        except BaseException as error:  # ranks may still write
            self._failure = error
            return
        else:
            self.last = target, state["step"]
            self.saved(target)
        if self.ranks.first:
            remove_aside(aside)


def _renewed(path: Path, target: Path, state: dict[str, Any]) -> Path:
    """Replaces the state of a checkpoint. One that was named by its step may get another name. Returns its path."""
    sharded.write_state(path, state)
    return path if path == target or path.name.startswith("epoch") else sharded.rename(path, target)
