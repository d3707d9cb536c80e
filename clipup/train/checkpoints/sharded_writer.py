"""Writes sharded checkpoints while training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...atomic_files import make_aside, remove_aside
from ..parallel.ranks import Ranks, waiting_group
from . import sharded
from .file import not_written

LOG = logging.getLogger("clipup.train")
_VOTE_SECONDS = 0.5
"""Seconds between the votes of ranks that wait for a checkpoint. A frozen rank does not vote."""


class ShardedWriter:
    """Writes one checkpoint at a time, in a thread.

    The threads of all ranks communicate in a process group of their own. Unlike that of DCP's ``async_save``, the
    thread is a daemon, so that waiting for a frozen rank does not keep the process alive.
    """

    def __init__(self, ranks: Ranks, configs: dict[str, Any], written: Callable[[Path], None]) -> None:
        """
        Args:
            configs: of the model, which every checkpoint holds.
            written: called with each complete checkpoint.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.ranks, self.configs, self.written = ranks, configs, written
        self.whole: tuple[Path, int] | None = None
        """The last complete checkpoint and its step."""
        self._group = waiting_group() if ranks.several else None
        cuda = ranks.device.type == "cuda"
        how = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self._stager = DefaultStager(how)
        """Copies tensors into the CPU's memory, which it keeps for the next tensors."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, target: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        """Starts to write a checkpoint once the previous checkpoint is complete. Returns its path.

        If a complete checkpoint of the same step exists, its tensors are kept and only the state is replaced.

        Args:
            tensors: this rank's, which are copied now.
        """
        self.wait()
        last, step = self.whole or (target, -1)
        if step == state["step"] and (target == last or target.name.startswith("step")):
            self.ranks.on_first(lambda: sharded.write_state(last, state))
            self.written(last)
            return last
        aside = self.ranks.on_first(lambda: make_aside(target.parent))
        arguments = self._stager.stage(tensors), aside, target, state
        self._thread = threading.Thread(target=self._write, args=arguments, name="clipup checkpoint", daemon=True)
        self._thread.start()
        return target

    def _write(self, staged: Any, aside: Path, target: Path, state: dict[str, Any]) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)
        finish = partial(sharded.complete, aside, target, configs=self.configs, state=state)
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
            self.whole = target, state["step"]
            self.written(target)
        if self.ranks.first:
            remove_aside(aside)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. A collective.

        Raises:
            OSError: it could not be written.
            RuntimeError: another rank was lost.
        """
        while self.ranks.any(self._thread is not None and self._thread.is_alive()):
            if self._thread is not None:
                self._thread.join(_VOTE_SECONDS)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait_alone(self) -> None:
        """Until this rank's part is written, if the others' threads meet it in time."""
        if self._thread is not None:
            self._thread.join(self.ranks.timeout.total_seconds())
