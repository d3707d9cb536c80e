"""Saving a run, and restoring it: its checkpoints, and the model directory at its end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...models import model_card, model_names, saving, tokenizers
from ...models.shard_files import MODEL, described, read_index
from .. import resume
from ..finite import FiniteGuard
from ..log.recorder import LOG, Recorder
from ..log.results import TrainingInterrupted
from ..optim import load_optimizer_state, optimizer_state
from ..options import TrainOptions
from ..ranks import whole_state
from ..ranks.distributed import Ranks
from ..setup import Built
from ..step import TrainStep
from ..validations import RETRIEVAL, ZERO_SHOT
from . import open_clip_format, sharded_checkpoints
from .run_directory import RunDirectory
from .run_state import RunState
from .sharded_saves import ShardedSaves


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
        self._sharded: ShardedSaves | None = None
        if options.fsdp_checkpoint == "sharded" and directory is not None:
            self._sharded = self.sharded

    @property
    def sharded(self) -> ShardedSaves:
        """Made before the first step if it is needed, by all ranks."""
        if self._sharded is None:
            arguments = self.built.model, self.train_step.optimizer, self.ranks, self._configs()
            folder = self.directory.checkpoints if self.directory else Path()  # then only to load
            limit = self.options.save_total_limit
            prune = partial(open_clip_format.prune, limit=limit)
            self._sharded = ShardedSaves(folder, *arguments, self._is_saved, prune)
        return self._sharded

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            ValueError: the checkpoint is of another model, or from within an epoch of other data.
        """
        self._check_function(checkpoint, source)
        self.state.restore(checkpoint, source, self.options, self.conditions, self.ranks)
        same_optimizer = (
            checkpoint.get("conditions", self.conditions)["options"].get("opt", "adamw") == self.options.opt
        )
        if source.is_dir():
            self._restore_sharded(checkpoint, source, same_optimizer)
        else:
            open_clip_format.restore(self.built.model, checkpoint["state_dict"], source)
            if same_optimizer:
                open_clip_format.check_optimizer(checkpoint, source)
                load_optimizer_state(self.train_step.optimizer, self.built.model, checkpoint["optimizer"])
        if self.train_step.scaler is not None and "scaler" in checkpoint:
            self.train_step.scaler.load_state_dict(checkpoint["scaler"])
        self.guard.skipped, self.guard.in_row = checkpoint.get("skipped_steps", (0, 0))
        self.guard.last_checkpoint = source

    def _check_function(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Whether the model is the one of the checkpoint, whose weights may fit another one too.

        Raises:
            ValueError: it computes something else, or has another tokenizer; with ``resume_with_changes`` a warning.
        """
        configs = read_index(source).configs if source.is_dir() else checkpoint
        try:
            open_clip_format.check_configs(self.built.model, configs, self.built.tokenizer_files, source)
        except ValueError as error:
            if not self.options.resume_with_changes:
                raise ValueError(f"{error}. If the change is meant, add resume_with_changes") from error
            if self.ranks.first:
                LOG.warning("%s", error)

    def _restore_sharded(self, checkpoint: dict[str, Any], source: Path, same_optimizer: bool) -> None:
        if not same_optimizer:
            raise ValueError(
                f"{source} is a sharded checkpoint of another opt, which is read as a whole; resume with the former "
                "opt, or start from its weights: clipup convert makes a model directory for --model"
            )
        weights = {
            name.removeprefix(MODEL): tuple(tensor.size)
            for name, tensor in described(source).items()
            if name.startswith(MODEL)
        }
        open_clip_format.check_model(self.built.model, weights, source)
        self.sharded.load(source, checkpoint["optimizer"])
        if self.directory is not None and source.resolve().parent == self.directory.checkpoints.resolve():
            self.sharded.last = source, self.state.step

    def save(self, names: list[str], recorder: Recorder) -> Path | None:
        """Writes a checkpoint under these names, and returns the path of the last. A failure is raised on every rank.

        A sharded one has one name, and is written while the training continues; ``wait`` waits for it.
        """
        if self.directory is None or not names:
            return None
        self.ranks.doing("saving a checkpoint", self.state.step)
        self.guard.check_loss(self.state.step, float(self.ranks.mean(self.guard.loss_since_check)))
        self.guard.check_weights(self.state.step, self.built.model, self.train_step.optimizer, self.ranks)
        if self.options.fsdp_checkpoint == "sharded":
            kept = next((name for name in names if name != open_clip_format.LATEST), None)
            name = sharded_checkpoints.directory_name(kept, self.state.step)
            return self.sharded.save(name, self._state(recorder))
        paths = [self.directory.checkpoints / name for name in names]
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        optimizer = optimizer_state(self.train_step.optimizer, self.built.model, keep=self.ranks.first)
        rest = {**self._state(recorder), **self._configs(), "state_dict": weights}
        self.ranks.first_does(lambda: open_clip_format.save({**rest, "optimizer": optimizer}, *paths))
        self._is_saved(paths[-1])
        if self.options.save_total_limit is not None:
            self.ranks.first_does(lambda: open_clip_format.prune(paths[0], self.options.save_total_limit))
        return paths[-1]

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. A failure is raised on every rank."""
        if self._sharded is not None:
            self.ranks.doing("saving a checkpoint", self.state.step)
            self._sharded.wait()

    def end(self, error: BaseException) -> None:
        """When an error ends the run: waits, unless it is impatience or other ranks may not come to the end."""
        together = not self.ranks.several or isinstance(error, FloatingPointError)
        impatient = isinstance(error, KeyboardInterrupt) and not isinstance(error, TrainingInterrupted)
        if together and not impatient:
            with suppress(OSError, RuntimeError):  # the error that ended the run is the one to raise
                self.wait()

    def _is_saved(self, path: Path) -> None:
        self.guard.last_checkpoint = path

    def _state(self, recorder: Recorder) -> dict[str, Any]:
        """A checkpoint without tensors of the model and the optimizer."""
        scaler = self.train_step.scaler
        return {
            **self.state.for_checkpoint(),
            "name": self.directory.root.name,
            "skipped_steps": (self.guard.skipped, self.guard.in_row),
            "conditions": self.conditions,
            "evaluations": len(recorder.records("evaluations")),
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }

    def _configs(self) -> dict[str, Any]:
        """What makes the checkpoint a model without anything else: ``Weights.configs``."""
        files = self.built.tokenizer_files
        moe_config = getattr(self.built.model, "moe_config", None)
        preprocess_cfg = getattr(getattr(self.built.model, "visual", None), "preprocess_cfg", None)
        return {
            "model_cfg": self.built.model_cfg,
            "moe_cfg": None if moe_config is None else moe_config.to_dict(),
            "preprocess_cfg": None if preprocess_cfg is None else saving.preprocess_fields(preprocess_cfg),
            "tokenizer_files": None if files is None else tokenizers.for_checkpoint(files),
        }

    def delete_kept(self, epoch: int, successor: int) -> None:
        """Deletes the kept checkpoint of an epoch, if there is one, once that of the epoch ``successor`` is whole. If
        there is no such checkpoint, as when it was not to be kept at the time, the former one stays."""
        if self.directory is None:
            return
        self.wait()
        kept, next_one = (self.directory.checkpoints / open_clip_format.epoch_name(of) for of in (epoch, successor))
        if self.ranks.first and (next_one.exists() or next_one.with_suffix("").exists()):
            open_clip_format.delete(kept)
            open_clip_format.delete(kept.with_suffix(""))

    def save_model(self) -> None:
        """The model as a directory that loads without the run, with the last evaluation in its card. A collective."""
        if self.directory is None or self.built.model_cfg is None:
            return
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        self.ranks.first_does(lambda: self._save_model(self.unsharded(weights)))

    def _save_model(self, model: nn.Module) -> None:
        base_model = model_names.base_model(self.options.model, self.options.pretrained)
        saving.save_with_tokenizer(
            model,
            self.directory.model,
            self.built.model_cfg,
            self.built.tokenizer_files,
            base_model=base_model,
        )
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

    def how_to_continue(self) -> str:
        """For the message of a run that ends early: its last checkpoint, and how to continue from it."""
        last = self.guard.last_checkpoint
        if last is None or self.directory is None:
            return "There is no checkpoint yet"
        return f"The last checkpoint, {last}, is whole; to continue, {self.command_to_continue()}"

    def command_to_continue(self) -> str:
        """In words."""
        return f"run the same command with --name {shlex.quote(self.directory.root.name)} --resume latest"
