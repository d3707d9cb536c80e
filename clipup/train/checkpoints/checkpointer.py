"""Saving a run, and restoring it: its checkpoints, and the model directory at its end."""

from __future__ import annotations

import shlex
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...atomic_files import make_aside, remove_aside
from ...models import model_card, model_names, saving, tokenizers
from ...models.state_dicts import check_fit
from ...moe.layer import saved_config
from .. import resume
from ..evaluations import RETRIEVAL, ZERO_SHOT
from ..finite import FiniteGuard
from ..log.records import LOG, Recorder, TrainingInterrupted
from ..options import TrainOptions
from ..ranks import whole_state
from ..ranks.distributed import Ranks, waiting_group
from ..setup import Built
from ..step import TrainStep
from . import open_clip_format, sharded
from .run_directory import RunDirectory
from .run_state import RunState

_VOTE_SECONDS = 0.5
"""How often ranks that wait for a checkpoint tell each other that they do. A frozen rank does not."""


class Checkpointer:
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
    ) -> None:
        """
        Args:
            order: what the samples of a step depend on (``Epochs.order``).
        """
        self.options = options
        self.built = built
        self.train_step = train_step
        self.state = state
        self.guard = guard
        self.ranks = ranks
        self.directory = directory
        self.conditions = resume.conditions(options, ranks.world_size, steps_of_epoch, order)
        self._sharded = options.fsdp_checkpoint == "sharded" and directory is not None
        self._whole: tuple[Path, int] | None = None
        """The last sharded checkpoint that is whole, and its step."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if self._sharded:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self._group = waiting_group() if ranks.several else None
            cuda = ranks.device.type == "cuda"
            how = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(how)
            """Copies tensors into the CPU's memory, which it keeps for the next ones."""

    def restore(self, checkpoint: dict[str, Any], source: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            ValueError: the checkpoint is of a model that computes something else or has another tokenizer (a warning
                with ``resume_with_changes``), or whose weights do not fit, or from within an epoch of other data.
        """
        model, optimizer = self.built.model, self.train_step.optimizer
        try:
            open_clip_format.check_configs(model, checkpoint, self.built.tokenizer_files, source)
        except ValueError as error:  # its weights may fit
            if not self.options.resume_with_changes:
                raise ValueError(f"{error}. If the change is meant, add resume_with_changes") from error
            if self.ranks.first:
                LOG.warning("%s", error)
        self.state.restore(checkpoint, source, self.options, self.conditions, self.ranks)
        same_optimizer = checkpoint.get("conditions", self.conditions)["options"]["opt"] == self.options.opt
        if source.is_dir():
            check_fit(model, sharded.shapes(source), str(source))
            moments = optimizer if same_optimizer else None
            sharded.restore(model, moments, checkpoint["optimizer"], source, self.ranks.control)
            if self.directory is not None and source.parent.resolve() == self.directory.checkpoints.resolve():
                self._whole = source, self.state.step
        else:
            open_clip_format.restore(model, checkpoint["state_dict"], source)
            if same_optimizer:
                whole_state.load_optimizer_state(optimizer, model, checkpoint["optimizer"])
        if self.train_step.scaler is not None and "scaler" in checkpoint:
            self.train_step.scaler.load_state_dict(checkpoint["scaler"])
        self.guard.skipped, self.guard.in_row = checkpoint.get("skipped_steps", (0, 0))
        self.guard.last_checkpoint = source

    def save(self, names: list[str], recorder: Recorder) -> Path | None:
        """Writes a checkpoint under these names, and returns the path of the last. A failure is raised on every rank.

        A sharded one has one name, and is written while the training continues; ``wait`` waits for it.
        """
        if self.directory is None or not names:
            return None
        self.guard.check_weights(self.state.step, self.built.model, self.train_step.optimizer, self.ranks)
        if self._sharded:
            name = f"step_{self.state.step}" if names[0] == open_clip_format.LATEST else Path(names[0]).stem
            return self._save_sharded(self.directory.checkpoints / name, self._state(recorder))
        paths = [self.directory.checkpoints / name for name in names]
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        optimizer = whole_state.optimizer_state(self.train_step.optimizer, self.built.model)
        for index, values in optimizer["state"].items():
            optimizer["state"][index] = whole_state.gathered(values, keep=self.ranks.first)
        rest = {**self._state(recorder), **self._configs(), "state_dict": weights}
        self.ranks.first_does(lambda: open_clip_format.save({**rest, "optimizer": optimizer}, *paths))
        self._saved(paths[-1])
        return paths[-1]

    def _save_sharded(self, target: Path, state: dict[str, Any]) -> Path:
        """Starts to write a sharded checkpoint, after the one before is whole. Returns its path.

        Each rank copies its share of the tensors into the CPU's memory, and a thread writes the copy. Where a whole
        checkpoint of the step will do, its tensors are the same, and only the state is replaced.
        """
        self.wait()
        optimizer = whole_state.optimizer_state(self.train_step.optimizer, self.built.model)
        state = {**state, "optimizer": sharded.without_tensors(optimizer)}
        last, step = self._whole or (target, -1)
        if step == state["step"] and (target == last or target.name.startswith("step")):
            self.ranks.first_does(lambda: sharded.write_state(last, state))
            self._saved(last)
            return last
        aside = self.ranks.first_does(lambda: make_aside(target.parent))
        tensors = sharded.own_tensors(self.built.model, optimizer, self.ranks.first)
        arguments = self._stager.stage(tensors), aside, target, state
        self._thread = threading.Thread(target=self._write, args=arguments, name="clipup checkpoint", daemon=True)
        self._thread.start()
        return target

    def _write(self, staged: Any, aside: Path, target: Path, state: dict[str, Any]) -> None:
        """In a thread, which meets those of the other ranks in a group of their own. It does not keep the process from
        ending, as that of DCP's ``async_save`` does: one that waits for a frozen rank would."""

        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)
        finish = partial(sharded.complete, aside, target, configs=self._configs(), state=state)
        try:
            sharded.write(staged, aside, self._group, finish)
        except OSError as error:
            self._failure = open_clip_format.not_written(target, error)
            if self.ranks.first:
                LOG.warning("%s", self._failure)
        except BaseException as error:  # ranks may still write
            self._failure = error
            return
        else:
            self._whole = target, state["step"]
            self._saved(target)
        if self.ranks.first:
            remove_aside(aside)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. A collective.

        Raises:
            OSError: it could not be written.
            RuntimeError: another rank was lost.
        """
        while self._sharded and self.ranks.any(self._thread is not None and self._thread.is_alive()):
            if self._thread is not None:
                self._thread.join(_VOTE_SECONDS)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def end(self, error: BaseException) -> None:
        """When an error ends the run: waits, unless it is impatience or other ranks may not come to the end. Data that
        cannot be used may end one rank alone, whose thread does not need the others' training."""
        together = not self.ranks.several or isinstance(error, FloatingPointError)
        impatient = isinstance(error, KeyboardInterrupt) and not isinstance(error, TrainingInterrupted)
        if together and not impatient:
            with suppress(OSError, RuntimeError):  # the error that ended the run is the one to raise
                self.wait()
        elif isinstance(error, ValueError) and self._thread is not None:
            self._thread.join(self.options.dist_timeout)

    def _saved(self, path: Path) -> None:
        """Takes note of a checkpoint that is whole, and deletes those that it replaces."""
        self.guard.last_checkpoint = path
        limit = self.options.save_total_limit
        if self.ranks.first and (self._sharded or limit is not None):
            try:
                open_clip_format.prune(path, limit)
            except OSError as error:
                LOG.warning("an old checkpoint could not be deleted: %s", error)

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
        moe_config = saved_config(self.built.model)
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
        kept, next_one = (self.directory.checkpoints / f"epoch_{of}.pt" for of in (epoch, successor))
        if self.ranks.first and (next_one.exists() or next_one.with_suffix("").exists()):
            open_clip_format.delete(kept)
            open_clip_format.delete(kept.with_suffix(""))

    def save_model(self) -> None:
        """The model as a directory that loads without the run, with the last evaluation in its card. A collective."""
        if self.directory is None or self.built.model_cfg is None:
            return
        weights = whole_state.weights(self.built.model, keep=self.ranks.first)
        self.ranks.first_does(lambda: self._save_model(weights))

    def _save_model(self, weights: dict[str, Any]) -> None:
        options, directory = self.options, self.directory.model
        model = self.built.model
        if self.built.unsharded is not None:
            model = self.built.unsharded
            model.load_state_dict(weights, assign=True)
        base_model = model_names.base_model(options.model, options.pretrained)
        files = self.built.tokenizer_files
        saving.save_with_tokenizer(model, directory, self.built.model_cfg, files, base_model=base_model)
        results = []
        if retrieval := self.state.numbers_now(RETRIEVAL):
            of = {"val_data": options.val_data, "multi_positive": options.multi_positive}
            results.append({**of, "retrieval": retrieval})
        for name, numbers in (self.state.numbers_now(ZERO_SHOT) or {}).items():
            results.append({"images": getattr(options, name), "zero_shot": numbers})
        for numbers in results:  # as clipup eval writes them
            model_card.add_results(directory, {**numbers, "precision": self.train_step.precision})

    def how_to_continue(self) -> str:
        """For the message of a run that ends early: its last checkpoint, and how to continue from it."""
        last = self.guard.last_checkpoint
        if last is None or self.directory is None:
            return "There is no checkpoint yet"
        name = shlex.quote(self.directory.root.name)
        resume = f"--name {name} --resume latest" + (" and without --force" if self.options.force else "")
        return f"The last checkpoint is {last}; to continue, run the same command with {resume}"
