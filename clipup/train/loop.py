"""The training loop: steps, epochs, checkpoints, evaluations, and the ways in which a run can end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .. import card, origin
from .. import checkpoint as model_directories
from ..evaluate.precision import Precision
from . import carry_over, checkpoints, metrics, rng
from .build import Built, Epochs, build_loader, build_model, build_teacher, build_validation, check_complete
from .distributed import Ranks, connect
from .openclip import contrastive_loss, schedule
from .optim import adamw
from .options import TrainOptions
from .records import Record, Recorder, RunDirectory, run_name
from .signals import StopRequest
from .step import Batch, StepLosses, TrainStep

_DATA = 1
"""Sets the seed of an epoch's data apart from that of its training."""


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; no checkpoint was written since."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; ``checkpoint`` is where to go on from."""

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class Every(NamedTuple):
    """Calls a function after every ``steps`` steps and after the last one, on rank 0.

    The function takes the model (not wrapped) and returns numbers to record, or None. It cannot disturb the run: random
    numbers drawn in it do not count, and neither does its time.
    """

    steps: int
    function: Callable[[nn.Module], dict[str, Any] | None]


class TrainResult(NamedTuple):
    """What a run leaves behind."""

    model: nn.Module
    """In evaluation mode."""
    steps: int
    """Optimizer steps done, those before a resume included."""
    seconds: float
    """Time in training, without evaluations and checkpoints."""
    history: list[Record]
    """A record a logged step, as ``clipup.train`` describes it; on rank 0."""
    evaluations: list[Record]
    directory: Path | None


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
        loader: batches (images, texts) in place of ``options.train_data``: open_clip's DataInfo, or anything with a
            length that can be iterated again and again. Give ``options.steps`` or ``options.epochs``.
        callbacks: evaluations along the way.

    Raises:
        FileExistsError: the directory of the run holds another one.
        ValueError: options or data that cannot be trained on.
        NonFiniteLoss: the loss became NaN or infinite.
        OSError: a checkpoint could not be written; the one before is whole.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint. Without ``options.logs`` it is KeyboardInterrupt,
            at once.
    """
    check_complete(options, model, loader)
    ranks = connect(options)
    directory = _directory(options, ranks)
    resume = directory.resumed_from(options.resume) if directory and ranks.first else None
    resume = ranks.of_first(resume) if directory else options.resume
    state = None if resume is None else checkpoints.load(resume)
    precision: Precision = options.precision or ("amp" if ranks.device.type == "cuda" else "fp32")
    rng.seed_everything(options.seed)
    built = build_model(options, ranks.device, precision, model, preprocess, tokenizer)
    if loader is None:
        loader = build_loader(options, built, ranks, epoch=state["epoch"] if state else 0)
    trainer = Trainer(options, built, Epochs(loader, options.accum_freq), ranks, directory, precision, callbacks)
    if state is not None:
        trainer.restore(state, resume)
    with StopRequest(enabled=directory is not None) as stop:
        return trainer.run(stop)


def _directory(options: TrainOptions, ranks: Ranks) -> RunDirectory | None:
    """The run's directory, which is not touched yet; what rank 0 refuses is refused on every rank."""
    if options.logs is None:
        return None
    directory = RunDirectory(Path(options.logs) / ranks.of_first(run_name(options)))
    ranks.first_does(lambda: directory.check(options))
    return directory


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
        self.validate = build_validation(options, built, precision)
        self.optimizer = adamw(self.model, options)
        if built.optimizer_state is not None:
            carry_over.load_state(self.optimizer, self.model, built.optimizer_state)
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
        self.total_steps = options.steps or options.epochs * data.steps
        self.total_epochs = math.inf if options.steps else options.epochs
        self.set_lr = schedule(options, self.optimizer, self.total_steps)
        self.epoch = 0
        self.step = 0
        self.step_of_epoch = 0
        self.seconds = 0.0
        self._rng: dict[str, Any] | None = None
        self._loss_since_check = torch.zeros((), device=ranks.device)
        self._evaluated_at = -1
        self._validated: dict[str, Any] | None = None

    def restore(self, state: dict[str, Any], source: str | Path) -> None:
        """Puts the run where the checkpoint was written."""
        checkpoints.restore(self.model, state["state_dict"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.train_step.scaler is not None and "scaler" in state:
            self.train_step.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.step = state.get("step", self.epoch * self.data.steps)
        self.step_of_epoch = state.get("step_of_epoch", 0)
        self.seconds = state.get("seconds", 0.0)
        states = state.get("rng", [])
        within_epoch = self.step_of_epoch > 0 and len(states) == self.ranks.world_size
        self._rng = states[self.ranks.rank] if within_epoch else None

    def run(self, stop: StopRequest) -> TrainResult:
        """Trains until the last step."""
        self.stop = stop
        first = self.ranks.first
        if self.directory is not None:
            self.ranks.first_does(lambda: self.directory.prepare(self.options))
        self.recorder = Recorder(self.directory if first else None, self.options.report_to if first else "", self.step)
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None if first else True)
        where = f"{self.ranks.device}, {self.ranks.world_size} ranks"
        self.recorder.log.info("from step %d to step %d on %s", self.step, self.total_steps, where)
        try:
            while self.step < self.total_steps and self.epoch < self.total_epochs:
                self._run_epoch()
            self._finish()
        finally:
            self.bar.close()
            self.recorder.close()
        root = self.directory.root if self.directory else None
        return TrainResult(self.model, self.step, self.seconds, self.recorder.steps, self.recorder.evaluations, root)

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
        try:
            with self._data_rng.drawing():
                return next(steps, None)
        except RuntimeError:
            if self.ranks.several or not self.stop.received:
                raise
            self._interrupt()

    def _one_step(self, batches: list[Batch]) -> None:
        if not self.options.skip_scheduler:
            self.set_lr(self.step)
        losses = self.train_step(batches)
        self.step += 1
        self.step_of_epoch += 1
        self._loss_since_check = self._loss_since_check + losses.total
        self._images += sum(len(images) for images, _ in batches) * self.ranks.world_size
        if self.step % self.options.log_every_n_steps == 0 or self.step == self.total_steps:
            self._log(losses)
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self.bar.update()
        for callback in self.callbacks:
            if self.step % callback.steps == 0 or self.step == self.total_steps:
                self._evaluate(callback.function)
        if self.ranks.any(self.stop.received):
            self._interrupt()
        if self.options.save_every_n_steps and self.step % self.options.save_every_n_steps == 0:
            self._save(checkpoints.LATEST)

    def _log(self, losses: StepLosses) -> None:
        scalars = {"loss": losses.total, **losses.scalars(), "since": self._loss_since_check}
        numbers = metrics.read(scalars, self.model, self.ranks)
        self._check_finite(numbers.pop("since"))
        now = time.perf_counter()
        layers = {"layers": numbers.pop("layers")} if "layers" in numbers else {}
        record = {
            "step": self.step,
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **numbers,
            "images_per_second": self._images / (now - self._logged),
            "seconds": self.seconds + now - self._mark,
            **layers,
        }
        self._images, self._logged = 0, now
        if self.ranks.first:
            self.recorder.step(record)
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

    def _check_finite(self, loss_since_check: float) -> None:
        """Refuses to go on from a loss that is NaN or infinite, before anything is saved."""
        if not math.isfinite(loss_since_check):
            kept = checkpoints.newest(self.directory.checkpoints) if self.directory else None
            whole = f"the last checkpoint, {kept}, is from before and whole" if kept else "there is no checkpoint yet"
            raise NonFiniteLoss(
                f"the loss is {loss_since_check} at step {self.step} or became so since the step logged before; "
                f"{whole}. Lower lr, set grad_clip_norm (1.0), or use another precision"
            )
        self._loss_since_check = torch.zeros_like(self._loss_since_check)

    def _end_epoch(self) -> None:
        self.epoch += 1
        self.step_of_epoch = 0
        self.recorder.log.info("epoch %d done at step %d; %d samples skipped", self.epoch, self.step, self.data.skipped)
        if self.options.val_frequency and self.epoch % self.options.val_frequency == 0:
            self._validate()
        names = [checkpoints.LATEST] if self.options.save_most_recent else []
        if self.options.save_frequency and self.epoch % self.options.save_frequency == 0:
            names.append(checkpoints.epoch_name(self.epoch))
        self._save(*names)
        if self.options.delete_previous_checkpoint and self.directory and self.ranks.first:
            (self.directory.checkpoints / checkpoints.epoch_name(self.epoch - 1)).unlink(missing_ok=True)

    def _validate(self) -> None:
        if self.validate is not None and self._evaluated_at != self.step:
            self._evaluated_at = self.step
            self._validated = self._evaluate(self.validate)

    def _evaluate(self, function: Callable[[nn.Module], dict[str, Any] | None]) -> dict[str, Any] | None:
        """On rank 0; the others wait. Leaves generators, modes and the clock as they were."""
        numbers = None
        if self.ranks.first:
            with rng.preserved(self.ranks.device):
                numbers = function(self.model)
            self.model.train()
            if numbers is not None:
                place = {"step": self.step, "epoch": self.epoch, "seconds": self.seconds}
                self.recorder.evaluation({**place, **numbers})
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
        """The last evaluation and checkpoint, and the model by itself."""
        self._validate()
        self._save(checkpoints.LATEST)
        self.model.eval()
        if self.directory and self.ranks.first and self.built.model_cfg is not None:
            base_model = origin.base_model(self.options.model, self.options.pretrained)
            model_directories.save_pretrained(
                self.model, self.directory.model, self.built.model_cfg, base_model=base_model
            )
            if self._evaluated_at == self.step:
                results = {"val_data": self.options.val_data, "precision": self.train_step.precision}
                results |= {"multi_positive": self.options.multi_positive, "retrieval": self._validated}
                card.add_results(self.directory.model, results)

    def _save(self, *names: str) -> None:
        """Writes a checkpoint under these names. A failure on rank 0 is raised on every rank."""
        if self.directory is None or not names:
            return
        self._check_finite(float(self.ranks.mean(self._loss_since_check)))
        states = self.ranks.gather(rng.get_state(self.ranks.device))
        paths = [self.directory.checkpoints / name for name in names]
        self.ranks.first_does(lambda: checkpoints.save(self._state(states), *paths))
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
