"""Saving the state of a run, and restoring it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models import factory, tokenizers
from ..parallel import whole_state
from ..parallel.ranks import Ranks
from . import file, kept, sharded
from .directory import RunDirectory
from .format import format_of
from .options import RunDirectoryOptions
from .position import RunState
from .resume import Conditions, restore_position
from .sharded_writer import LOG, ShardedWriter


class Checkpointer:
    """Writes and restores the checkpoints of a run. Without a directory nothing is written."""

    def __init__(
        self,
        options: RunDirectoryOptions,
        directory: RunDirectory | None,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        conditions: Conditions,
        configs: dict[str, Any],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """
        Args:
            state: the position, which is saved as it is when a checkpoint is written.
            configs: configs that let a checkpoint load on its own: ``Weights.configs``.
            scaler: of the gradients in float16.
        """
        self.options, self.directory, self.ranks = options, directory, ranks
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.state, self.conditions, self.configs = state, conditions, configs
        is_sharded = options.fsdp_checkpoint == "sharded" and directory is not None
        self._writer = ShardedWriter(ranks, configs, self._written) if is_sharded else None

    def restore(self, checkpoint: dict[str, Any], source: Path, same_optimizer: bool = True) -> None:
        """Restores the position at which the checkpoint was written.

        Args:
            same_optimizer: whether the optimizer is of the kind whose state was saved.

        Raises:
            ValueError: the checkpoint is of a model that computes something else or has another tokenizer (a warning
                with ``resume_with_changes``), or whose weights do not fit, or from within an epoch of other data.
        """
        try:
            factory.check_configs(self.model, checkpoint, source)
            tokenizers.check_same(tokenizers.saved_in(self.configs, source), checkpoint, source)
        except ValueError as error:  # its weights may fit
            if not self.options.resume_with_changes:
                raise ValueError(f"{error}. If the change is meant, add resume_with_changes") from error
            if self.ranks.first:
                LOG.warning("%s", error)
        restore_position(self.state, checkpoint, self.conditions, source)
        optimizer = self.optimizer if same_optimizer else None
        format_of(source).restore(source, checkpoint, self.model, optimizer, self.ranks.control)
        own = self.directory is not None and source.parent.resolve() == self.directory.checkpoints.resolve()
        if self._writer is not None and own and source.is_dir():
            self._writer.whole = source, self.state.step
        if self.scaler is not None and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.state.last_checkpoint = source

    def save(self, *names: str) -> Path | None:
        """Writes a checkpoint under these names, and returns the path of the last. A failure is raised on every rank.

        A sharded checkpoint has a single name and is written while training continues; ``wait`` waits for it.
        """
        if self.directory is None or not names:
            return None
        state = {
            **self.state.state_dict(),
            "name": self.directory.root.name,
            "conditions": self.conditions.state_dict(),
            **({} if self.scaler is None else {"scaler": self.scaler.state_dict()}),
        }
        optimizer = whole_state.optimizer_state(self.optimizer, self.model)
        if self._writer is not None:
            name = f"step_{self.state.step}" if names[0] == file.LATEST else Path(names[0]).stem
            state["optimizer"] = sharded.without_tensors(optimizer)
            tensors = sharded.own_tensors(self.model, optimizer, self.ranks.first)
            return self._writer.save(self.directory.checkpoints / name, state, tensors)
        paths = [self.directory.checkpoints / name for name in names]
        weights = whole_state.gathered(self.model.state_dict(), keep=self.ranks.first)
        for index, values in optimizer["state"].items():
            optimizer["state"][index] = whole_state.gathered(values, keep=self.ranks.first)
        state |= {**self.configs, "state_dict": weights, "optimizer": optimizer}
        self.ranks.on_first(lambda: file.save(state, *paths))
        self._written(paths[-1])
        return paths[-1]

    def _written(self, path: Path) -> None:
        """Records a complete checkpoint, and deletes the checkpoints that it replaces."""
        self.state.last_checkpoint = path
        limit = self.options.save_total_limit
        if self.ranks.first and (self._writer is not None or limit is not None):
            try:
                kept.prune(path, limit)
            except OSError as error:
                LOG.warning("an old checkpoint could not be deleted: %s", error)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. A collective.

        Raises:
            OSError: it could not be written.
            RuntimeError: another rank was lost.
        """
        if self._writer is not None:
            self._writer.wait()

    def wait_alone(self) -> None:
        """Until this rank's part of the checkpoint that is being written is whole, or the others' threads are late."""
        if self._writer is not None:
            self._writer.wait_alone()

    def delete_kept(self, epoch: int, successor: int) -> None:
        """Deletes the kept checkpoint of an epoch, if it exists, once the checkpoint of the epoch ``successor`` is
        complete. If that does not exist, for example because it was not to be kept, the former checkpoint stays."""
        if self.directory is None:
            return
        self.wait()
        former, next_one = (self.directory.checkpoints / f"epoch_{each}.pt" for each in (epoch, successor))
        if self.ranks.first and (next_one.exists() or next_one.with_suffix("").exists()):
            kept.delete(former)
            kept.delete(former.with_suffix(""))

    def how_to_continue(self) -> str:
        """For the message of a run that ends early: its last checkpoint, and how to continue from it."""
        last = self.state.last_checkpoint
        if last is None or self.directory is None:
            return "There is no checkpoint yet"
        name = shlex.quote(self.directory.root.name)
        resume = f"--name {name} --resume latest" + (" and without --force" if self.options.force else "")
        return f"The last checkpoint is {last}; to continue, run the same command with {resume}"
