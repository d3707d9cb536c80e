"""The training loop: epochs, steps, and how a run ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..data.processes import LostWorker, detect_lost_workers_when_reading, lost_workers_named
from ..evaluate.retrieval import NonFiniteFeatures
from ..precision import Precision
from .cards import pairs_per_second_at_peak
from .checkpoints import open_clip_format
from .checkpoints.checkpointer import Checkpointer
from .checkpoints.run_directory import RunDirectory
from .checkpoints.run_state import Clock, Length, RunState
from .evaluations import Evaluation, build_validations
from .finite import FiniteGuard
from .log.records import KINDS, LOG, Every, Record, TrainingInterrupted, TrainResult, read_records
from .optim import base_lr, create_optimizer, schedule
from .options import TrainOptions
from .ranks import parallel, whole_state
from .ranks.distributed import Ranks
from .reports import Reports, check_reports
from .setup import Built
from .signals import StopRequest, StopWaiting
from .step import Batch, StepLosses, TrainStep
from .training_data import Epochs

_Result = TypeVar("_Result")

_DATA, _STEP = 1, 2
"""Separate the seeds of an epoch's data from those of steps."""


def seed_everything(seed: int, *more: int) -> None:
    """Seeds Python, NumPy and torch from integers >= 0, for example a run's seed, an epoch and a rank."""
    mixed = int(np.random.SeedSequence((seed, *more)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class Trainer:
    """A run between its first and its last step."""

    def __init__(
        self,
        options: TrainOptions,
        built: Built,
        data: Epochs,
        ranks: Ranks,
        directory: RunDirectory | None,
        precision: Precision,
        callbacks: Sequence[Every] = (),
    ) -> None:
        self.options = options
        self.model = built.model
        self.data = data
        self.ranks = ranks
        self.directory = directory
        self.callbacks = callbacks
        self.validations = build_validations(options, built, precision, ranks)
        self.pairs_at_peak = pairs_per_second_at_peak(self.model, ranks.device, ranks.world_size)
        wrapped = parallel.wrapped(self.model, options, ranks, precision)
        self.optimizer = create_optimizer(self.model, options)
        if built.optimizer_state is not None:
            whole_state.load_optimizer_state(self.optimizer, self.model, built.optimizer_state)
            built.optimizer_state["state"].clear()  # whole, while the optimizer's may be sharded
        self.train_step = TrainStep(
            wrapped,
            built.objective,
            self.optimizer,
            ranks.device,
            precision=precision,
            grad_clip_norm=options.grad_clip_norm,
            world_size=ranks.world_size,
            seed_batch=self._seed_batch,
        )
        self.guard = FiniteGuard(options.max_nonfinite_steps)
        self.state = RunState()
        self._start: Path | None = None
        self._continues = False
        self._lost: LostWorker | None = None
        self.clock = Clock(self.state)
        self.checkpoints = Checkpointer(
            options=options,
            built=built,
            train_step=self.train_step,
            state=self.state,
            guard=self.guard,
            ranks=ranks,
            directory=directory,
            steps_of_epoch=data.steps,
            order=data.order,
        )
        self._plan()

    def _plan(self) -> None:
        self.length = Length.of(self.options, self.data.steps, self.state.steps_before)
        self.set_lr = schedule(self.options, self.optimizer, self.length.steps, self.data.steps)

    def restore(self, checkpoint: dict[str, Any], source: Path, start: Path | None) -> None:
        """Puts the run where the checkpoint was written. ``start``: the checkpoint, if it is of another run.

        Raises:
            ValueError: the checkpoint is of another model, or from within an epoch of other data.
        """
        self.checkpoints.restore(checkpoint, source)
        self._start, self._continues = start, start is None
        if start is not None:
            self.state.validated = {}  # its records begin here
        self.data.restore(self.state.skipped_samples)
        self._plan()
        here = self.directory is not None and start is None
        self.state.finished = here and self.length.is_reached(self.state) and checkpoint.get("finished", False)

    def result_before(self) -> TrainResult:
        """The result of a run that was finished before. Writes nothing."""
        self.model.eval()
        records = {kind: read_records(self.directory.root / f"{kind}.jsonl") for kind in KINDS if self.ranks.first}
        return self._result(records, already_finished=True)

    def run(self, stop: StopRequest, notes: Sequence[str] = ()) -> TrainResult:
        """Trains until the last step. ``notes``: what the log says first."""
        self.stop = stop
        if self.directory is not None:
            self.ranks.first_does(partial(check_reports, self.options, self.directory, self._continues))
            self.ranks.first_does(partial(self.directory.prepare, self.options, self._start))
        self.reports = Reports(
            self.options,
            self.model,
            state=self.state,
            length=self.length,
            ranks=self.ranks,
            directory=self.directory,
            continues=self._continues,
            notes=notes,
        )
        try:
            if not self.options.skip_scheduler:
                LOG.info("the learning rate rises to %g over %d steps (--warmup)", self.options.lr, self.options.warmup)
            self._train()
            skipped = sum(self.data.skipped(self.ranks.gather).values())
        except BaseException as error:
            self.checkpoints.end(error)
            self.reports.failure(error)
            if isinstance(error, LostWorker):
                raise LostWorker(f"{error}. {self.checkpoints.how_to_continue()}") from error
            raise
        finally:
            self.data.close()
            self.reports.close()
        records = {kind: self.reports.recorder.records(kind) for kind in KINDS}
        return self._result(records, skipped=skipped)

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
        """From the position of the run to its end, with what a killed run left undone after its last checkpoint.

        A run that goes on from a checkpoint of another one saves it as its own first, to be found from here on.
        """
        if self._start is not None and self.directory is not None:
            self._save(open_clip_format.LATEST)
            self.checkpoints.wait()
        if self.state.step >= self.length.steps and self.state.step_of_epoch >= self.data.steps:
            self._end_epoch()
        elif self.state.epoch and self.state.step_of_epoch == 0:
            self._after_epoch()
        while not self.length.is_reached(self.state):
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
                more = self.state.step < self.length.steps
                batches = self._next(steps, self.state.step_of_epoch) if more else None
                self._end_if_asked()
                if batches is None:
                    break
                self._one_step(batches)
        more = self.state.step < self.length.steps
        if more and self.state.step == at_start and self.state.step_of_epoch == 0:
            raise ValueError("the training data gave no whole batch in an epoch; lower batch_size, or pass more data")
        if more or self.state.step_of_epoch >= self.data.steps:
            self._end_epoch()

    def _next(self, steps: Iterator[list[Batch]], number: int) -> list[Batch] | None:
        """The batches of the step of this number in the epoch, None at the end of the epoch and where the run should
        end. The random numbers that they draw depend on the seed, the epoch, the number and the rank."""
        seed_everything(self.options.seed, self.state.epoch, number, self.ranks.rank, _DATA)
        with self.clock.timed("data"):
            batches = self._unless_asked(lost_workers_named()(partial(next, steps, None)))
        detect_lost_workers_when_reading()
        return batches

    def _unless_asked(self, act: Callable[[], _Result]) -> _Result | None:
        """What a function returns that may be left at any point. A request to stop, or the loss of a data worker, ends
        it with None, and then ``_end_if_asked`` the run."""
        try:
            with self.stop.waiting():
                return act()
        except StopWaiting:
            return None
        except (RuntimeError, ValueError, OSError) as error:
            if self.stop.received:  # the signal may have ended the data workers
                return None
            if not isinstance(error, LostWorker):
                raise
            self._lost = error
            return None

    def _end_if_asked(self) -> None:
        """Ends the run if a rank was asked to stop or has lost a data worker. All ranks are between the same steps."""
        if not self.ranks.any(self.stop.received or self._lost is not None):
            return
        latest = self._save(open_clip_format.LATEST)
        self.checkpoints.wait()
        for lost in filter(None, self.ranks.gather(self._lost)):
            raise lost
        assert latest is not None  # without a directory signals are left alone
        raise TrainingInterrupted(
            f"stopped after step {self.state.step} of {self.length.steps}. {self.checkpoints.how_to_continue()}",
            latest,
        )

    def _one_step(self, batches: list[Batch]) -> None:
        state, options = self.state, self.options
        if not options.skip_scheduler:
            self.set_lr(state.step)
        last = state.step + 1 == self.length.steps
        logged = last or (state.step + 1) % options.log_every_n_steps == 0
        with self.clock.timed("step"):
            losses = self.train_step(batches, measure_routing=logged)
        state.step += 1
        state.step_of_epoch += 1
        samples = sum(len(images) for images, _ in batches) * self.ranks.world_size
        state.samples_seen += samples
        self.clock.step_done(samples)
        self.guard.count(state.step, self.train_step, losses, self.ranks)
        if logged:
            self._log(losses)
        self.reports.step()
        for callback in self.callbacks:
            if state.step % callback.steps == 0 or last:
                self._evaluate(callback.function)
        due = options.save_every_n_steps and state.step % options.save_every_n_steps == 0
        if due and not self.ranks.any(self.stop.received):  # else the run ends, and saves then
            self._save(open_clip_format.LATEST)

    def _seed_batch(self, index: int) -> None:
        """Random numbers in a batch's forward pass depend on the run's seed, the step, and the batch's number among
        those of all ranks: so a resumed run has the same ones, and any number of ranks with batches of this size."""
        number = self.ranks.rank * self.options.accum_freq + index
        seed_everything(self.options.seed, self.state.step, number, _STEP)

    def _log(self, losses: StepLosses) -> None:
        """Every number of metrics.jsonl: those of ``StepLosses`` from the device, and what this process knows."""
        numbers = losses.record(self.ranks)
        times = self.clock.logged()
        mfu = {} if self.pairs_at_peak is None else {"mfu": times["images_per_second"] / self.pairs_at_peak}
        place = {"step": self.state.step, "epoch": self.state.epoch, "lr": base_lr(self.optimizer)}
        self.reports.metrics({**place, **numbers, **times, **mfu, "skipped_steps": self.guard.skipped})

    def _end_epoch(self) -> None:
        """Saves first, so that unreadable data, for training or validation, do not cost the epoch."""
        self.state.epoch += 1
        self.state.step_of_epoch = 0
        epoch, every = self.state.epoch, self.options.save_frequency
        skipped = sum(self.data.skipped(self.ranks.gather).values())
        LOG.info("epoch %d done at step %d; %d samples skipped", epoch, self.state.step, skipped)
        # The kept name first: a run that is killed between the two continues from here and writes the other one again.
        names = [f"epoch_{epoch}.pt"] if every and epoch % every == 0 else []
        if self.options.save_most_recent:
            names.append(open_clip_format.LATEST)
        self._save(*names)
        self.data.check_skipped(self.ranks.gather)
        self._after_epoch()

    def _after_epoch(self) -> None:
        """What comes after an epoch's checkpoint; a run that was killed before its end does it when it resumes."""
        self._validate(at_end=False)
        epoch, every = self.state.epoch, self.options.save_frequency
        if self.options.delete_previous_checkpoint and every and epoch % every == 0:
            self.checkpoints.delete_kept(epoch - every, successor=epoch)

    def _validate(self, at_end: bool) -> None:
        """The validations that are due at an epoch's end, or at the end of the run all, except those that were done at
        this step. One process may leave it at any point; several ranks finish it together."""
        if self.ranks.several:
            self._measure(at_end)
            return
        self._unless_asked(partial(self._measure, at_end))
        self._end_if_asked()

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
        parallel.share_batch_statistics(self.model, self.ranks)
        if self.ranks.first or shared or self.options.is_sharded:
            numbers = evaluation(self.model)
            self.model.train()
            if self.ranks.first and numbers is not None:
                self.reports.evaluation(numbers)
        self.ranks.gather_patiently(None)  # the others wait
        self.clock.restart()
        return numbers

    def _save(self, *names: str) -> Path | None:
        if self.directory is not None:
            self.state.skipped_samples = self.data.skipped(self.ranks.gather)
        path = self.checkpoints.save(list(names), self.reports.recorder)
        self.clock.restart()
        return path

    def _finish(self) -> None:
        """The last evaluation, the model directory, and the checkpoint that says that the run is finished."""
        self.guard.check_weights(self.state.step, self.model, self.optimizer, self.ranks)
        parallel.share_batch_statistics(self.model, self.ranks)
        if self.validations and self.state.step_of_epoch:  # an end within an epoch: nothing has saved the last steps
            self._save(open_clip_format.LATEST)
        self._validate(at_end=True)
        try:
            self.checkpoints.save_model()
        except Exception:
            self._save(open_clip_format.LATEST)
            self.checkpoints.wait()
            raise
        self.state.finished = True
        self._save(open_clip_format.LATEST)
        self.checkpoints.wait()
        self.model.eval()
