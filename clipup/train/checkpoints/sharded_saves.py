"""Saving sharded checkpoints while the training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...atomic_files import make_aside, remove_aside, remove_directory
from ...models import shard_files
from ...models.shard_files import FileSum, Index
from ..log.recorder import LOG
from ..ranks.distributed import Ranks, unlimited_group
from . import sharded_checkpoints, sharded_state
from .sharded_checkpoints import OptimizerValues


class ShardedSaves:
    """Each rank copies its share of the tensors into the CPU's memory, and a thread writes the copy.

    The threads of the ranks meet in a process group of their own. All methods but ``last`` are collectives.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        configs: dict[str, Any],
        saved: Callable[[Path], None],
        prune: Callable[[Path], None],
    ) -> None:
        """
        Args:
            configs: what ``Index.configs`` should be.
            saved: called with a checkpoint that is whole, on every rank in its thread.
            prune: called with it on rank 0; deletes others.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.folder, self.model, self.optimizer, self.ranks = folder, model, optimizer, ranks
        self.configs, self.saved, self.prune = configs, saved, prune
        self.last: tuple[Path, int] | None = None
        """The last checkpoint that is whole, and its step."""
        self._names = sharded_state.parameter_names(model)
        self._group = unlimited_group() if ranks.several else None
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._after_first_step = optimizer.register_step_post_hook(self._check_kinds)

    def _check_kinds(self, *_: object) -> None:
        """Of what the state of an optimizer consists is known after its first step; nobody should lose more to it."""
        self._after_first_step.remove()
        sharded_state.check_kinds(self.optimizer, self._names)

    def load(self, directory: Path, others: OptimizerValues) -> None:
        """Puts the tensors of a checkpoint, whatever its layout, into the model and the optimizer, with the optimizer's
        other values."""
        from . import dcp_storage

        described = shard_files.described(directory)
        wanted, state = sharded_state.targets(self.model, self.optimizer, self._names, described, others)
        dcp_storage.load(wanted, directory, self._group)
        self.optimizer.load_state_dict(state)

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Starts to write a checkpoint, after the one before is whole. Returns its path.

        If that is of the same step, its tensors are the same, and only the state is replaced.

        Raises:
            OSError: the one before could not be written, or this one not started.
        """
        self.wait()
        state = {**state, "optimizer": sharded_state.other_values(self.optimizer, self._names)}
        if self.last is not None and self.last[1] == state["step"]:
            self.last = self.ranks.first_does(lambda: self._replace_state(name, state)), state["step"]
            self.saved(self.last[0])
            return self.last[0]
        aside = self.ranks.first_does(lambda: make_aside(self.folder))
        tensors = sharded_state.all_tensors(self.model, self.optimizer, self._names)
        staged: Any = self._stager.stage(sharded_state.own_share(tensors, self.ranks.first))
        target = self.folder / name
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
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, staged: Any, aside: Path, target: Path, state: dict[str, Any]) -> None:
        from . import dcp_storage

        def finish(files: dict[str, FileSum]) -> None:
            sharded_checkpoints.finish(aside, target, Index(files, self.configs), state)

        try:
            dcp_storage.save(staged, aside, self._group, finish)
        except OSError as error:
            self._failure = self._explained(error, target)
            if self.ranks.first:
                LOG.warning("%s", self._failure)
        except BaseException as error:
            self._failure = error
        else:
            self.last = target, state["step"]
            self.saved(target)
        if self.ranks.first and not isinstance(self._failure, RuntimeError):  # then ranks may still write
            remove_aside(aside)
        if self.ranks.first and self._failure is None:
            try:
                self.prune(target)
            except OSError as error:
                LOG.warning("an old checkpoint could not be deleted: %s", error)

    def _explained(self, error: OSError, target: Path) -> OSError:
        before = f"{self.last[0]} is whole" if self.last else "there is no earlier one of this run"
        return OSError(
            f"could not write the checkpoint {target}: {error}; {before}. Free some space, then continue with --resume "
            "latest"
        )

    def _replace_state(self, name: str, state: dict[str, Any]) -> Path:
        path, _ = self.last or (self.folder / name, 0)
        before = sharded_checkpoints.read_state(path)  # this run may train fewer parameters than the tensors are of
        sharded_checkpoints.write_state(path, state | {"optimizer": before["optimizer"]})
        if sharded_checkpoints.is_between_epochs(path) and path.name != name:
            if path.with_name(name).exists():
                remove_directory(path.with_name(name))
            path = path.rename(path.with_name(name))
        return path
