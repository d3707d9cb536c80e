"""The training loop: epochs, steps, and how a run ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.options import StepOptions
from ..data.processes import LostWorker, detect_lost_workers_when_reading, lost_workers_named
from ..evaluate.retrieval import NonFiniteFeatures
from .checkpoints import file, kept
from .checkpoints.checkpointer import Checkpointer
from .checkpoints.position import RunState
from .evaluations import Evaluation, Validation
from .finite import FiniteGuard
from .log.clock import Clock
from .log.records import KINDS, LOG, Record, read_records
from .log.reports import Reports
from .objectives.objective import Batch
from .optimizer.schedule import Schedule, base_lr, set_lr
from .parallel import sharding
from .parallel.ranks import Ranks
from .result import Every, TrainingInterrupted, TrainResult
from .signals import StopRequest
from .step import TrainStep
from .training_data import Epochs

_DATA, _STEP = 1, 2
"""Numbers in seeds, so that an epoch's data and a step do not share a seed."""


def seed_everything(seed: int, *more: int) -> None:
    """Seeds Python, NumPy and torch from integers >= 0, for example a run's seed, an epoch and a rank."""
    mixed = int(np.random.SeedSequence((seed, *more)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class Seeds(NamedTuple):
    """Seeds of a run's random numbers; a resumed run draws the same numbers."""

    options: StepOptions
    state: RunState
    rank: int

    def of_data(self, number: int) -> None:
        """Seeds what the batches of a step of the epoch draw: by the seed, the epoch, the number and the rank."""
        seed_everything(self.options.seed, self.state.epoch, number, self.rank, _DATA)

    def of_batch(self, index: int) -> None:
        """Seeds a batch's forward pass: by the seed, the step, and the batch's number among those of all ranks, so that
        any number of ranks with batches of this size draws the same."""
        number = self.rank * self.options.accum_freq + index
        seed_everything(self.options.seed, self.state.step, number, _STEP)


class Trainer:
    """A run between its first and its last step."""

    def __init__(
        self,
        step: TrainStep,
        data: Epochs,
        schedule: Schedule,
        seeds: Seeds,
        checkpoints: Checkpointer,
        validations: Sequence[Validation] = (),
        callbacks: Sequence[Every] = (),
        save_model: Callable[[Ranks, list[dict[str, Any]]], object] | None = None,
    ) -> None:
        """
        Args:
            step, data, schedule, seeds, checkpoints: the parts of a run. ``checkpoints`` has its position and ranks.
            validations, callbacks: evaluations along the way.
            save_model: writes the model directory at the end, with results of evaluations; a collective.
        """
        self.step, self.data, self.schedule, self.seeds, self.checkpoints = step, data, schedule, seeds, checkpoints
        self.validations, self.callbacks, self.save_model = validations, callbacks, save_model
        self.saving, self.state, self.ranks = checkpoints.options, checkpoints.state, checkpoints.ranks
        self.model, self.directory = step.module, checkpoints.directory
        self.guard = FiniteGuard(schedule.options.max_nonfinite_steps, self.state)
        self.clock = Clock(self.state)
        self.start: Path | None = None
        """Checkpoint of another run from which this run begins."""
        self._lost: LostWorker | None = None

    def restore(
        self, checkpoint: dict[str, Any], source: Path, start: Path | None, same_optimizer: bool = True
    ) -> None:
        """Restores the position at which the checkpoint was written.

        Args:
            start: the checkpoint, if it is of another run.
            same_optimizer: whether the optimizer is of the kind whose state was saved.

        Raises:
            ValueError: the checkpoint is of another model, or from within an epoch of other data.
        """
        self.checkpoints.restore(checkpoint, source, same_optimizer)
        self.start = start
        if start is not None:
            self.state.validated = {}  # its records begin here
        self.data.restore(self.state.skipped_samples)
        self.schedule.steps_before = self.state.steps_before
        here = self.directory is not None and start is None
        self.state.finished = here and self._is_done and checkpoint.get("finished", False)

    @property
    def _is_done(self) -> bool:
        by_epochs = not self.schedule.options.steps and self.state.epoch >= self.schedule.options.epochs
        return by_epochs or self.state.step >= self.schedule.steps

    def result_before(self) -> TrainResult:
        """The result of a run that was finished before. Writes nothing."""
        self.model.eval()
        records = {kind: read_records(self.directory.root / f"{kind}.jsonl") for kind in KINDS if self.ranks.first}
        return self._result(records, already_finished=True)

    def run(self, stop: StopRequest, reports: Reports) -> TrainResult:
        """Trains until the last step."""
        self.stop, self.reports = stop, reports
        try:
            if not self.schedule.options.skip_scheduler:
                rise = self.schedule.options.lr, self.schedule.warmup
                LOG.info("the learning rate rises to %g over %d steps (--warmup)", *rise)
            self._train()
            skipped = sum(self.data.skipped(self.ranks.gather).values())
        except BaseException as error:
            self._wait_for_checkpoint(error)
            self.reports.failure(error)
            if isinstance(error, LostWorker):
                raise LostWorker(f"{error}. {self.checkpoints.how_to_continue()}") from error
            raise
        finally:
            self.data.close()
            self.reports.close()
        records = {kind: self.reports.recorder.records(kind) for kind in KINDS}
        return self._result(records, skipped=skipped)

    def _wait_for_checkpoint(self, error: BaseException) -> None:
        """When an error ends the run: waits for the checkpoint that is being written, unless the user interrupted twice
        or other ranks may not finish. Unusable data may end a single rank; its writer does not need the others'
        training."""
        together = not self.ranks.several or isinstance(error, FloatingPointError)
        impatient = isinstance(error, KeyboardInterrupt) and not isinstance(error, TrainingInterrupted)
        if together and not impatient:
            with suppress(OSError, RuntimeError):  # the error that ended the run is raised
                self.checkpoints.wait()
        elif isinstance(error, ValueError):
            self.checkpoints.wait_alone()

    def _result(self, records: dict[str, list[Record]], **more: Any) -> TrainResult:
        return TrainResult(
            model=self.model,
            steps=self.state.step,
            seconds=self.state.seconds,
            history=records.get("metrics", []),
            evaluations=records.get("evaluations", []),
            directory=self.directory.root if self.directory else None,
            warnings=records.get("warnings", []),
            **more,
        )

    def _train(self) -> None:
        """Trains from the current position to the end, including work that a killed run left undone after its
        checkpoint.

        A run that begins from another run's checkpoint first saves it as its own, so that it can be resumed.
        """
        if self.start is not None and self.directory is not None:
            self._save(file.LATEST)
            self.checkpoints.wait()
        if self.state.step >= self.schedule.steps and self.state.step_of_epoch >= self.data.steps:
            self._end_epoch()
        elif self.state.epoch and self.state.step_of_epoch == 0:
            self._after_epoch()
        while not self._is_done:
            self._run_epoch()
        self._finish()

    def _run_epoch(self) -> None:
        """From ``step_of_epoch`` to the epoch's end, or to the run's last step within it.

        Indexed data start at any step. Others are read again from the epoch's start.
        """
        epoch, done = self.state.epoch, self.state.step_of_epoch
        again = done if self.data.order is None else 0
        self.model.train()
        at_start = self.state.step
        with closing(self.data.epoch(epoch, done - again)) as steps:
            for number in range(again):
                self._next(steps, number)
            self.clock.restart()
            while True:
                more = self.state.step < self.schedule.steps
                batches = self._next(steps, self.state.step_of_epoch) if more else None
                self._stop_if_requested()
                if batches is None:
                    break
                self._one_step(batches)
        more = self.state.step < self.schedule.steps
        if more and self.state.step == at_start and self.state.step_of_epoch == 0:
            raise ValueError("the training data gave no whole batch in an epoch; lower batch_size, or pass more data")
        if more or self.state.step_of_epoch >= self.data.steps:
            self._end_epoch()

    def _next(self, steps: Iterator[list[Batch]], number: int) -> list[Batch] | None:
        """The batches of the step of this number in the epoch. None at the end of the epoch and, for
        ``_stop_if_requested`` to end the run, after a request to stop or the loss of a data worker."""
        self.seeds.of_data(number)
        batches = None
        try:
            with self.clock.timed("data"):
                batches = self.stop.unless_stopped(lost_workers_named()(partial(next, steps, None)))
        except LostWorker as error:
            self._lost = error
        detect_lost_workers_when_reading()
        return batches

    def _stop_if_requested(self) -> None:
        """Ends the run if a rank was asked to stop or has lost a data worker. All ranks are between the same steps."""
        if not self.ranks.any(self.stop.received or self._lost is not None):
            return
        latest = self._save(file.LATEST)
        self.checkpoints.wait()
        for lost in filter(None, self.ranks.gather(self._lost)):
            raise lost
        assert latest is not None  # without a directory signals are left alone
        raise TrainingInterrupted(
            f"stopped after step {self.state.step} of {self.schedule.steps}. {self.checkpoints.how_to_continue()}",
            latest,
        )

    def _one_step(self, batches: list[Batch]) -> None:
        state = self.state
        set_lr(self.step.optimizer, self.schedule.rate(state.step))
        last = state.step + 1 == self.schedule.steps
        logged = last or (state.step + 1) % self.reports.options.log_every_n_steps == 0
        with self.clock.timed("step"):
            done = self.step(batches, measure_routing=logged)
        state.step += 1
        state.step_of_epoch += 1
        samples = sum(len(images) for images, _ in batches) * self.ranks.world_size
        state.samples_seen += samples
        self.clock.step_done(samples)
        self.guard.count(done, self.ranks)
        if logged:
            numbers = done.losses.record(self.ranks)
            self.reports.metrics(numbers, self.clock.logged(), base_lr(self.step.optimizer))
        self.reports.step()
        for callback in self.callbacks:
            if state.step % callback.steps == 0 or last:
                self._evaluate(callback.function)
        due = self.saving.save_every_n_steps and state.step % self.saving.save_every_n_steps == 0
        if due and not self.ranks.any(self.stop.received):  # else the run ends, and saves then
            self._save(file.LATEST)

    def _end_epoch(self) -> None:
        """Saves first, so that unreadable data, for training or validation, do not cost the epoch."""
        self.state.epoch += 1
        self.state.step_of_epoch = 0
        epoch, every = self.state.epoch, self.saving.save_frequency
        skipped = sum(self.data.skipped(self.ranks.gather).values())
        LOG.info("epoch %d done at step %d; %d samples skipped", epoch, self.state.step, skipped)
        # The kept name first: a run that is killed between the two continues from here and writes the other name again.
        names = [f"epoch_{epoch}.pt"] if every and epoch % every == 0 else []
        if self.saving.save_most_recent:
            names.append(file.LATEST)
        self._save(*names)
        self.data.check_skipped(self.ranks.gather)
        self._after_epoch()

    def _after_epoch(self) -> None:
        """Validates and deletes old checkpoints after an epoch's checkpoint; a resumed run does this if it was killed
        before."""
        self._validate(at_end=False)
        epoch, every = self.state.epoch, self.saving.save_frequency
        if self.saving.delete_previous_checkpoint and every and epoch % every == 0:
            self.checkpoints.delete_kept(epoch - every, successor=epoch)

    def _validate(self, at_end: bool) -> None:
        """The validations that are due at an epoch's end, or at the end of the run all, except those that were done at
        this step. One process may leave it at any point; several ranks finish it together."""
        if self.ranks.several:
            self._measure(at_end)
            return
        self.stop.unless_stopped(partial(self._measure, at_end))
        self._stop_if_requested()

    def _measure(self, at_end: bool) -> None:
        """
        Raises:
            NonFiniteWeights: a feature is NaN or infinite.
        """
        step, epoch = self.state.step, self.state.epoch
        for validation in self.validations:
            due = at_end or epoch and validation.every and epoch % validation.every == 0
            if not due or self.state.validated.get(validation.name, (-1,))[0] == step:
                continue
            try:
                self.state.validated[validation.name] = step, self._evaluate(validation.measure, shared=True)
            except NonFiniteFeatures as error:
                raise self.guard.diverged(f"{error} (evaluation at step {step})") from error

    def _evaluate(self, evaluation: Evaluation, shared: bool = False) -> dict[str, Any] | None:
        """Leaves modes and the clock as they were. On all ranks when it is shared, or when no rank has all
        weights. Otherwise on rank 0, and the others wait as long as it takes."""
        numbers = None
        sharding.share_batch_statistics(self.model, self.ranks)
        if self.ranks.first or shared or sharding.is_sharded(self.model):
            numbers = evaluation(self.model)
            self.model.train()
            if self.ranks.first and numbers is not None:
                self.reports.evaluation(numbers)
        self.ranks.gather_patiently(None)  # the others wait
        self.clock.restart()
        return numbers

    def _save(self, *names: str) -> Path | None:
        if self.directory is not None and names:
            self.state.skipped_samples = self.data.skipped(self.ranks.gather)
            self.state.evaluations = len(self.reports.recorder.records("evaluations"))
            self.guard.check_weights(self.model, self.step.optimizer, self.ranks)
        path = self.checkpoints.save(*names)
        if self.directory is not None and names and not self.state.finished:
            self.ranks.on_first(self.directory.set_model_aside)
        self.clock.restart()
        return path

    def _finish(self) -> None:
        """The last evaluation, the model directory, and the checkpoint that says that the run is finished."""
        self.guard.check_weights(self.model, self.step.optimizer, self.ranks)
        sharding.share_batch_statistics(self.model, self.ranks)
        if self.validations and self.state.step_of_epoch:  # an end within an epoch: nothing has saved the last steps
            self._save(file.LATEST)
        self._validate(at_end=True)
        try:
            self._save_model()
        except Exception:
            self._save(file.LATEST)
            self.checkpoints.wait()
            raise
        self.state.finished = True
        self._save(file.LATEST)
        self.checkpoints.wait()
        self.model.eval()

    def _save_model(self) -> None:
        if self.save_model is None:
            return
        results: list[dict[str, Any]] = []
        for validation in self.validations:
            step, numbers = self.state.validated.get(validation.name, (-1, None))
            results += validation.results(numbers) if numbers and step == self.state.step else []
        self.save_model(self.ranks, [each | {"precision": self.step.precision} for each in results])
        if self.directory is not None:
            self.ranks.on_first(partial(kept.delete, self.directory.former_model))
