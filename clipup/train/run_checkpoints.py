"""Saving a run, and restoring it: its checkpoints, and the model directory at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..pretrained import model_card, model_directory, origin, saving
from . import checkpoints, resume, whole_state
from .distributed import Ranks
from .finite import FiniteGuard
from .optim import load_optimizer_state, optimizer_state
from .options import TrainOptions
from .recorder import Recorder
from .run_directory import RunDirectory
from .run_state import RunState
from .setup import Built
from .step import TrainStep
from .validations import RETRIEVAL, ZERO_SHOT


class RunCheckpoints:
    """Writes and restores the checkpoints of a run. Without a directory nothing is written."""

    def __init__(
        self,
        options: TrainOptions,
        built: Built,
        train_step: TrainStep,
        state: RunState,
        guard: FiniteGuard,
        ranks: Ranks,
        directory: RunDirectory | None,
        steps_of_epoch: int,
        order: dict[str, Any] | None,
        unsharded: Callable[[dict[str, Any]], nn.Module],
    ) -> None:
        """
        Args:
            order: what the samples of a step depend on (``Epochs.order``).
            unsharded: the model with weights of ``whole_state.weights``, on one rank.
        """
        self.options = options
        self.built = built
        self.train_step = train_step
        self.state = state
        self.guard = guard
        self.ranks = ranks
        self.directory = directory
        self.unsharded = unsharded
        self.conditions = resume.conditions(options, ranks.world_size, steps_of_epoch, order)

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            ValueError: the checkpoint is of another model, or from within an epoch of other data.
        """
        self.state.restore(checkpoint, source, self.options, self.conditions, self.ranks)
        checkpoints.restore(self.built.model, checkpoint["state_dict"], source)
        if checkpoint.get("conditions", self.conditions)["options"].get("opt", "adamw") == self.options.opt:
            load_optimizer_state(self.train_step.optimizer, self.built.model, checkpoint["optimizer"])
        if self.train_step.scaler is not None and "scaler" in checkpoint:
            self.train_step.scaler.load_state_dict(checkpoint["scaler"])
        self.guard.skipped, self.guard.in_row = checkpoint.get("skipped_steps", (0, 0))
        self.guard.last_checkpoint = source

    def save(self, names: list[str], recorder: Recorder) -> None:
        """Writes a checkpoint under these names. A failure on rank 0 is raised on every rank."""
        if self.directory is None or not names:
            return
        self.ranks.doing("saving a checkpoint", self.state.step)
        self.guard.check_loss(self.state.step, float(self.ranks.mean(self.guard.loss_since_check)))
        self.guard.check_weights(self.state.step, self.built.model, self.train_step.optimizer, self.ranks)
        paths = [self.directory.checkpoints / name for name in names]
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        optimizer = optimizer_state(self.train_step.optimizer, self.built.model, keep=self.ranks.first)
        self.ranks.first_does(lambda: checkpoints.save(self._checkpoint(weights, optimizer, recorder), *paths))
        self.guard.last_checkpoint = paths[-1]

    def _checkpoint(self, weights: dict[str, Any], optimizer: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
        moe_config = getattr(self.built.model, "moe_config", None)
        scaler = self.train_step.scaler
        return {
            **self.state.for_checkpoint(),
            "name": self.directory.root.name,
            "state_dict": weights,
            "optimizer": optimizer,
            "skipped_steps": (self.guard.skipped, self.guard.in_row),
            "conditions": self.conditions,
            "evaluations": len(recorder.records("evaluations")),
            "model_cfg": self.built.model_cfg,
            "moe_cfg": None if moe_config is None else moe_config.to_dict(),
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }

    def delete_before(self, epoch: int) -> None:
        """Deletes the kept checkpoint of the epoch before, if there is one."""
        if self.directory is not None and self.ranks.first:
            (self.directory.checkpoints / checkpoints.epoch_name(epoch - 1)).unlink(missing_ok=True)

    def save_model(self) -> None:
        """The model as a directory that loads without the run, with the last evaluation in its card. A collective."""
        if self.directory is None or self.built.model_cfg is None:
            return
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        self.ranks.first_does(lambda: self._save_model(self.unsharded(weights)))

    def _save_model(self, model: nn.Module) -> None:
        base_model = origin.base_model(self.options.model, self.options.pretrained)
        saving.save_pretrained(model, self.directory.model, self.built.model_cfg, base_model=base_model)
        for results in self._results():
            model_card.add_results(self.directory.model, {**results, "precision": self.train_step.precision})

    def _results(self) -> Iterator[dict[str, Any]]:
        """The numbers of the validations at the run's end, as ``clipup eval`` writes them."""
        found = self.state.numbers_now(RETRIEVAL)
        if found is not None:
            options = self.options
            yield {"val_data": options.val_data, "multi_positive": options.multi_positive, "retrieval": found}
        for name, numbers in (self.state.numbers_now(ZERO_SHOT) or {}).items():
            yield {"images": getattr(self.options, name), "zero_shot": numbers}

    def is_complete(self, source: Path) -> bool:
        """Whether the directory of a finished run holds the checkpoint ``source`` and the saved model."""
        if self.directory is None or not self.directory.holds(source):
            return False
        weights = self.directory.model / model_directory.WEIGHTS_NAME
        return self.built.model_cfg is None or self.ranks.of_first(weights.is_file())

    def how_to_continue(self) -> str:
        """For the message of a run that ends early: its last checkpoint, and how to continue from it."""
        last = self.guard.last_checkpoint
        if last is None or self.directory is None:
            return "There is no checkpoint yet"
        return (
            f"The last checkpoint, {last}, is whole; to continue, run the same command with --name "
            f"{self.directory.root.name} --resume latest"
        )
