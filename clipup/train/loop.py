"""The training loop: steps, epochs, checkpoints, evaluations, and the ways in which a run can end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..evaluate.retrieval import NonFiniteFeatures
from ..precision import Precision
from ..pretrained import model_card, model_directory, origin, saving
from . import checkpoints, collapse, optimizer_upcycling, resume, rng, step_metrics
from .console import Console
from .distributed import Ranks, joined
from .finite import FiniteGuard
from .objectives import contrastive_loss
from .optim import adamw, load_optimizer_state, schedule
from .options import TrainOptions
from .results import Every, TrainingInterrupted, TrainResult
from .run_directory import LOG, Recorder, RunDirectory, run_name
from .setup import Built, Epochs, build_loader, build_model, build_teacher, build_validation, check_complete
from .signals import StopRequest, notice_lost_workers_when_data_are_read
from .step import Batch, StepLosses, TrainStep

_DATA = 1
"""Sets the seed of an epoch's data apart from that of its training."""


def train(
    options: TrainOptions,
    *,
    model: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
    loader: Any = None,
    callbacks: Sequence[Every] = (),
) -> TrainResult:
    """Trains a model with the contrastive loss and the sparse layers' losses.

    Args:
        options: everything that the command line can say.
        model: trained in place of one built from ``options.model``.
        preprocess: image transform, or (training, validation) pair; None takes the built model's own.
        tokenizer: texts to token ids; None takes the built model's own.
        loader: batches (images, texts) in place of ``options.train_data``: ``TrainData``, or anything with a
            length that can be iterated again and again. Give ``options.steps`` or ``options.epochs``.
        callbacks: evaluations along the way.

    Raises:
        FileExistsError: the directory of the run holds another one.
        DirectoryInUse: another process runs in it.
        ValueError: options or data that cannot be trained on, or a checkpoint that cannot be resumed from.
        NonFiniteLoss, NonFiniteGradients, NonFiniteWeights: values became NaN or infinite.
        ChildProcessError: a data worker was killed.
        RankLost: another rank died or failed. A rank that waits for a frozen one ends with exit code 3 instead.
        OSError: a checkpoint could not be written, and the one before is whole; or one could not be read.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint. Without ``options.logs`` it is KeyboardInterrupt,
            at once.
    """
    check_complete(options, model, loader)
    with joined(options) as ranks, _directory(options, ranks) as directory:
        source, state, notes = resume.find_checkpoint(options, directory, ranks)
        if state is not None:
            notes += resume.changes(state, options, ranks.world_size, source)
        precision: Precision = options.precision or ("amp" if ranks.device.type == "cuda" else "fp32")
        rng.seed_everything(options.seed)
        built = build_model(options, ranks.device, precision, model, preprocess, tokenizer)
        if loader is None:
            loader = build_loader(options, built, ranks, epoch=state["epoch"] if state else 0)
        trainer = Trainer(options, built, Epochs(loader, options.accum_freq), ranks, directory, precision, callbacks)
        if state is not None:
            trainer.restore(state, source)
            if trainer.finished:
                return trainer.result_before()
        for note in notes if ranks.first else ():
            LOG.warning("%s", note)
        with StopRequest(enabled=directory is not None) as stop:
            return trainer.run(stop, notes)


@contextmanager
def _directory(options: TrainOptions, ranks: Ranks) -> Iterator[RunDirectory | None]:
    """The run's directory, locked by rank 0, otherwise untouched. What rank 0 refuses is refused on every rank."""
    if options.logs is None:
        yield None
        return
    directory = RunDirectory(Path(options.logs) / ranks.of_first(run_name(options)))
    with ExitStack() as held:
        ranks.first_does(lambda: held.enter_context(directory.locked()))
        ranks.first_does(lambda: directory.check(options))
        yield directory


def _without_traceback(error: Exception) -> Exception:
    """An error that a data worker raised: torch hands it over with the worker's traceback as its message."""
    _, _, message = str(error).rpartition(f"\n{type(error).__name__}: ")
    return type(error)(message.strip())


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
        self.built = built
        self.model = built.model
        self.data = data
        self.ranks = ranks
        self.directory = directory
        self.callbacks = callbacks
        self.validate = build_validation(options, built, precision, ranks)
        self.optimizer = adamw(self.model, options)
        if built.optimizer_state is not None:
            optimizer_upcycling.load_state(self.optimizer, self.model, built.optimizer_state)
        loss = contrastive_loss(options, self.model, ranks.rank, ranks.world_size)
        self.train_step = TrainStep(
            ranks.wrap(self.model),
            loss,
            self.optimizer,
            ranks.device,
            precision,
            options.grad_clip_norm,
            teacher=build_teacher(options, self.model, ranks.device, precision),
        )
        self.total_epochs = math.inf if options.steps else options.epochs
        self._plan(steps_before=0)
        self.guard = FiniteGuard(options.max_nonfinite_steps, ranks.device)
        self.conditions = resume.conditions(options, ranks.world_size, data.steps)
        self.finished = False
        self.samples_seen = 0
        self.epoch = 0
        self.step = 0
        self.step_of_epoch = 0
        self.seconds = 0.0
        self._rng: dict[str, Any] | None = None
        self.evaluations_before: int | None = None
        self._evaluated_at = -1
        self._validated: dict[str, Any] | None = None

    def _plan(self, steps_before: int) -> None:
        """Total and schedule. ``steps_before``: by how many steps a run whose epochs have become longer or shorter is
        ahead of one that always had those of now."""
        self._steps_before = steps_before
        self.total_steps = self.options.steps or steps_before + self.options.epochs * self.data.steps
        self.set_lr = schedule(self.options, self.optimizer, self.total_steps)

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            ValueError: the checkpoint is of another model, or from within an epoch of other data.
        """
        other_length = resume.other_length(state, self.data.steps, source)
        checkpoints.restore(self.model, state["state_dict"], source)
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.train_step.scaler is not None and "scaler" in state:
            self.train_step.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.step = state.get("step", self.epoch * self.data.steps)
        self.step_of_epoch = state.get("step_of_epoch", 0)
        self.seconds = state.get("seconds", 0.0)
        samples_of_step = self.options.batch_size * self.options.accum_freq * self.ranks.world_size
        self.samples_seen = state.get("samples_seen", self.step * samples_of_step)
        self.guard.skipped, self.guard.in_row = state.get("skipped_steps", (0, 0))
        self._plan(state.get("steps_before", 0))
        if other_length:
            self.step_of_epoch = self.data.steps if self.step_of_epoch else 0  # all of an epoch, or nothing
            self._plan(self.step - self.step_of_epoch - self.epoch * self.data.steps)
        self.evaluations_before = state.get("evaluations")
        self._evaluated_at, self._validated = state.get("validated", (-1, None))
        done = self.step >= self.total_steps or self.epoch >= self.total_epochs
        self.finished = done and state.get("finished", False) and self._is_whole(source)
        self.guard.last_checkpoint = source
        states = state.get("rng", [])
        within_epoch = self.step_of_epoch > 0 and len(states) == self.ranks.world_size
        self._rng = states[self.ranks.rank] if within_epoch else None

    def result_before(self) -> TrainResult:
        """What a run that was finished before has left behind. Writes nothing."""
        self.model.eval()
        history, evaluations, warnings = self.directory.history() if self.ranks.first else ([], [], [])
        done = self.model, self.step, self.seconds, history, evaluations, self.directory.root, warnings
        return TrainResult(*done, already_finished=True)

    def run(self, stop: StopRequest, notes: Sequence[str] = ()) -> TrainResult:
        """Trains until the last step. ``notes``: what the log says first."""
        self.stop = stop
        first = self.ranks.first
        if self.directory is not None:
            self.ranks.first_does(lambda: self.directory.prepare(self.options))
        self.recorder = Recorder(
            self.directory if first else None,
            self.options.report_to if first else "",
            self.step,
            self.evaluations_before,
        )
        self.console = Console(self.total_steps, self.step, shown=first)
        self.collapse = collapse.CollapseWatch(self.model, self.recorder.warnings)
        where = f"{self.ranks.device}, {self.ranks.world_size} rank{'s' if self.ranks.several else ''}"
        for note in notes if self.directory else ():
            self.recorder.log.warning("%s", note)
        begin = f"from step {self.step} to step {self.total_steps} on {where}"
        self.recorder.log.info("%s; %d samples seen", begin, self.samples_seen)
        self.console.say(f"training {begin}{f'; {self.directory.root}' if self.directory else ''}")
        self.ranks.on_loss(self._last_words, self.recorder.failure)
        try:
            with self.ranks.explained(), self._explaining_lost_workers():
                if self.step >= self.total_steps and self.step_of_epoch >= self.data.steps:
                    self._end_epoch()  # killed behind the last step, which was saved, and before the end of its epoch
                while self.step < self.total_steps and self.epoch < self.total_epochs:
                    self._run_epoch()
                self._finish()
        except BaseException as error:
            self.recorder.failure(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.console.close()
            self.recorder.close()
        root = self.directory.root if self.directory else None
        history, evaluations, warnings = self.recorder.steps, self.recorder.evaluations, self.recorder.warnings
        done = self.model, self.step, self.seconds, history, evaluations, root, warnings
        return TrainResult(*done, skipped=self._skipped())

    def _run_epoch(self) -> None:
        """From ``step_of_epoch`` to the epoch's end, or to the run's last step within it.

        Every epoch starts from its own seed, and its data draw from a stream of their own, so that they can be had
        again: a resumed run puts the generators where the checkpoint had them, and draws the batches that were seen.
        """
        seed = (self.options.seed, self.epoch, self.ranks.rank)
        rng.seed_everything(*seed)
        if self._rng is not None:
            rng.set_state(self._rng, self.ranks.device)
            self._rng = None
        self._data_rng = rng.Stream(self.ranks.device, *seed, _DATA)
        self.model.train()
        steps = self.data.epoch(self.epoch)
        for _ in range(self.step_of_epoch):
            self._next(steps)
        self._restart_clock()
        at_start = self.step
        while self.step < self.total_steps:
            batches = self._next(steps)
            if batches is None:
                break
            self._one_step(batches)
        if self.step < self.total_steps and self.step == at_start and self.step_of_epoch == 0:
            raise ValueError("the training data gave no whole batch in an epoch; lower batch_size, or pass more data")
        if self.step < self.total_steps or self.step_of_epoch >= self.data.steps:
            self._end_epoch()

    def _next(self, steps: Any) -> list[Batch] | None:
        """The next step's batches, None at the end of the epoch. Data workers may die of the Ctrl-C that we survive."""
        self.ranks.doing("reading data", self.step + 1)
        try:
            with self._data_rng.drawing():
                batches = next(steps, None)
            notice_lost_workers_when_data_are_read()
            return batches
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            if self.stop.received and not self.ranks.several:
                self._interrupt()
            if isinstance(error, ConnectionError | EOFError):
                raise ChildProcessError(f"a data worker has ended ({error}). {self._last_words()}") from error
            if str(error).startswith("Caught ") and isinstance(error, ValueError | OSError):
                raise _without_traceback(error) from error
            raise

    def _one_step(self, batches: list[Batch]) -> None:
        if not self.options.skip_scheduler:
            self.set_lr(self.step)
        self.ranks.doing("computing the step", self.step + 1, timed=True)
        losses = self.train_step(batches)
        self.step += 1
        self.step_of_epoch += 1
        samples = sum(len(images) for images, _ in batches) * self.ranks.world_size
        self.samples_seen += samples
        self._images += samples
        self.guard.count(self.step, self.train_step, losses, self.ranks, self.recorder.log)
        if self.step % self.options.log_every_n_steps == 0 or self.step == self.total_steps:
            self._log(losses)
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self.console.step(self.epoch)
        for callback in self.callbacks:
            if self.step % callback.steps == 0 or self.step == self.total_steps:
                self._evaluate(callback.function)
        if self.ranks.any(self.stop.received):
            self._interrupt()
        if self.options.save_every_n_steps and self.step % self.options.save_every_n_steps == 0:
            self._save(checkpoints.LATEST)

    def _log(self, losses: StepLosses) -> None:
        scalars = {"loss": losses.total, **losses.scalars(), "since": self.guard.loss_since_check}
        numbers = step_metrics.read(scalars, self.model, self.ranks)
        self.guard.check_loss(self.step, numbers.pop("since"))
        now = time.perf_counter()
        layers = {"layers": numbers.pop("layers")} if "layers" in numbers else {}
        record = {
            "step": self.step,
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **numbers,
            "images_per_second": self._images / (now - self._logged),
            "seconds": self.seconds + now - self._mark,
            "skipped_steps": self.guard.skipped,
            **layers,
        }
        self._images, self._logged = 0, now
        if self.ranks.first:
            self.recorder.step(record)
            self.console.logged(record)
            if collapsed := self.collapse.observe(record):
                warning = collapse.warning(collapsed)
                self.recorder.warning(warning, collapsed)
                self.console.say(f"warning: {warning}")

    def _end_epoch(self) -> None:
        self.epoch += 1
        self.step_of_epoch = 0
        self.recorder.log.info("epoch %d done at step %d; %d samples skipped", self.epoch, self.step, self._skipped())
        if self.options.val_frequency and self.epoch % self.options.val_frequency == 0:
            self._validate()
        names = [checkpoints.LATEST] if self.options.save_most_recent else []
        if self.options.save_frequency and self.epoch % self.options.save_frequency == 0:
            names.append(checkpoints.epoch_name(self.epoch))
        self._save(*names)
        if self.options.delete_previous_checkpoint and self.directory and self.ranks.first:
            (self.directory.checkpoints / checkpoints.epoch_name(self.epoch - 1)).unlink(missing_ok=True)

    def _skipped(self) -> int:
        """Samples that could not be read so far, each once, whichever ranks met it."""
        names: dict[str, int] = {}
        for of_rank in self.ranks.gather(self.data.skipped):
            names |= of_rank
        return sum(names.values())

    def _validate(self) -> None:
        if self.validate is not None and self._evaluated_at != self.step:
            self._evaluated_at = self.step
            try:
                self._validated = self._evaluate(self.validate, shared=True)
            except NonFiniteFeatures as error:
                raise self.guard.diverged(f"{error} (evaluation at step {self.step})") from error

    def _evaluate(
        self, function: Callable[[nn.Module], dict[str, Any] | None], shared: bool = False
    ) -> dict[str, Any] | None:
        """On all ranks when it is shared; else on rank 0, and the others wait as long as it takes. Leaves generators,
        modes and the clock as they were."""
        numbers = None
        self.ranks.doing("evaluating", self.step)
        if self.ranks.first or shared:
            with rng.preserved(self.ranks.device):
                numbers = function(self.model)
            self.model.train()
            if self.ranks.first and numbers is not None:
                place = {"step": self.step, "epoch": self.epoch, "seconds": self.seconds}
                record = {**place, **numbers}
                self.recorder.evaluation(record)
                self.console.evaluation(record)
        self.ranks.gather(None)
        self._restart_clock()
        return numbers

    def _interrupt(self) -> None:
        self._save(checkpoints.LATEST)
        latest = self.directory.checkpoints / checkpoints.LATEST
        raise TrainingInterrupted(
            f"stopped after step {self.step} of {self.total_steps}, saved {latest}; to go on, run the same command "
            f"with --name {self.directory.root.name} --resume latest",
            latest,
        )

    def _finish(self) -> None:
        """The last evaluation, the model by itself, and the checkpoint that says that this was all."""
        self.guard.check_weights(self.step, self.model, self.optimizer)
        self._validate()
        try:
            self.ranks.first_does(self._save_model)
        except OSError:
            self._save(checkpoints.LATEST)
            raise
        self.finished = True
        self._save(checkpoints.LATEST)
        self.model.eval()

    def _save_model(self) -> None:
        if self.directory is None or self.built.model_cfg is None:
            return
        base_model = origin.base_model(self.options.model, self.options.pretrained)
        saving.save_pretrained(self.model, self.directory.model, self.built.model_cfg, base_model=base_model)
        if self._evaluated_at == self.step:
            results = {"val_data": self.options.val_data, "precision": self.train_step.precision}
            results |= {"multi_positive": self.options.multi_positive, "retrieval": self._validated}
            model_card.add_results(self.directory.model, results)

    @contextmanager
    def _explaining_lost_workers(self) -> Iterator[None]:
        """Inside, a killed data worker is a ChildProcessError that says how to continue."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            reason = str(error).splitlines()[0].removesuffix(".")
            raise ChildProcessError(f"{reason}, for lack of memory perhaps. {self._last_words()}") from error

    def _last_words(self) -> str:
        """What is left when a process of the run is lost, and how to continue from it."""
        kept = self.guard.last_checkpoint
        if kept is None or self.directory is None:
            return "There is no checkpoint yet"
        return (
            f"The last checkpoint, {kept}, is whole; to continue, run the same command with --name "
            f"{self.directory.root.name} --resume latest"
        )

    def _is_whole(self, source: Path) -> bool:
        """Whether the directory of a finished run holds all of it: the checkpoint ``source``, and the model."""
        if self.directory is None or not self.directory.holds(source):
            return False
        weights = self.directory.model / model_directory.WEIGHTS_NAME
        return self.built.model_cfg is None or self.ranks.of_first(weights.is_file())

    def _save(self, *names: str) -> None:
        """Writes a checkpoint under these names. A failure on rank 0 is raised on every rank."""
        if self.directory is None or not names:
            return
        self.ranks.doing("saving a checkpoint", self.step)
        self.guard.check_loss(self.step, float(self.ranks.mean(self.guard.loss_since_check)))
        self.guard.check_weights(self.step, self.model, self.optimizer)
        states = self.ranks.gather(rng.get_state(self.ranks.device) if self._rng is None else self._rng)
        paths = [self.directory.checkpoints / name for name in names]
        self.ranks.first_does(lambda: checkpoints.save(self._state(states), *paths))
        self.guard.last_checkpoint = paths[0]
        self._restart_clock()

    def _state(self, rng_states: list[dict[str, Any]]) -> dict[str, Any]:
        moe_config = getattr(self.model, "moe_config", None)
        state = {
            "epoch": self.epoch,
            "name": self.directory.root.name,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "step_of_epoch": self.step_of_epoch,
            "steps_before": self._steps_before,
            "samples_seen": self.samples_seen,
            "skipped_steps": (self.guard.skipped, self.guard.in_row),
            "conditions": self.conditions,
            "finished": self.finished,
            "validated": (self._evaluated_at, self._validated),
            "evaluations": len(self.recorder.evaluations),
            "seconds": self.seconds,
            "rng": rng_states,
            "model_cfg": self.built.model_cfg,
            "moe_cfg": None if moe_config is None else moe_config.to_dict(),
        }
        if self.train_step.scaler is not None:
            state["scaler"] = self.train_step.scaler.state_dict()
        return state

    def _restart_clock(self) -> None:
        """Leaves out of the timings what happened since the last step."""
        self._mark = self._logged = time.perf_counter()
        self._images = 0
