"""The position of a run, and its clock."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .. import resume
from ..options import TrainOptions
from ..ranks.distributed import Ranks


@dataclass
class RunState:
    """Where a run is: what a checkpoint holds besides weights, optimizer and conditions."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Optimizer steps done."""
    step_of_epoch: int = 0
    """Those of the current epoch."""
    steps_before: int = 0
    """By how many steps a run whose epochs have changed their length is ahead of one that always had epochs of today's
    length."""
    samples_seen: int = 0
    seconds: float = 0.0
    """Time in training, without evaluations and checkpoints."""
    validated: dict[str, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    """The step of the last validation of each name, and its numbers, on rank 0."""
    evaluations: int | None = None
    """Records of evaluations when the checkpoint was written that the run continues from."""
    skipped_samples: dict[str, int] = field(default_factory=dict)
    """Samples that could not be read, as of the last checkpoint (``Epochs.skipped``)."""
    finished: bool = False
    """Whether all is done and the model is saved."""

    def restore(
        self, checkpoint: dict[str, Any], source: Path, options: TrainOptions, conditions: dict[str, Any], ranks: Ranks
    ) -> None:
        """Takes the position from a checkpoint, ours or open_clip_train's. ``finished`` remains False.

        Args:
            conditions: of this run.

        Raises:
            ValueError: the checkpoint is from within an epoch, and the rest of it would have other samples.
        """
        resume.check_position(checkpoint, conditions, source)
        steps_of_epoch = conditions["steps_of_epoch"]
        samples_of_step = options.batch_size * options.accum_freq * ranks.world_size
        step = checkpoint["epoch"] * steps_of_epoch
        of_open_clip = {"step": step, "samples_seen": step * samples_of_step}
        for name, value in (of_open_clip | checkpoint).items():
            if name in _SAVED and name != "finished":
                setattr(self, name, value)
        self.evaluations = checkpoint.get("evaluations")
        former = checkpoint.get("conditions", conditions)
        if resume.measures_differ(former["options"], conditions["options"]):
            self.validated = {}
        if former["steps_of_epoch"] != steps_of_epoch:
            self.step_of_epoch = steps_of_epoch if self.step_of_epoch else 0  # all of an epoch, or nothing
            self.steps_before = self.step - self.step_of_epoch - self.epoch * steps_of_epoch

    def numbers_now(self, validation: str) -> dict[str, Any] | None:
        """The numbers of a validation, if it was done at the current step; on rank 0."""
        step, numbers = self.validated.get(validation, (-1, None))
        return numbers if step == self.step else None

    def for_checkpoint(self) -> dict[str, Any]:
        """The entries of a checkpoint, without the number of evaluations."""
        return copy.deepcopy({name: getattr(self, name) for name in _SAVED})


_SAVED = [each.name for each in fields(RunState) if each.name != "evaluations"]


@dataclass(frozen=True)
class Length:
    """How long a run is: by ``options.steps``, or else by ``options.epochs``."""

    steps: int
    epochs: float

    @classmethod
    def of(cls, options: TrainOptions, steps_of_epoch: int, steps_before: int) -> Length:
        if options.steps:
            return cls(options.steps, math.inf)
        return cls(steps_before + options.epochs * steps_of_epoch, options.epochs)

    def is_reached(self, state: RunState) -> bool:
        return state.step >= self.steps or state.epoch >= self.epochs


@dataclass
class Clock:
    """Measures the time in training and, since the last logged step, the rate and how long steps waited for data."""

    state: RunState
    _mark: float = field(default_factory=time.perf_counter)
    _elapsed: float = 0.0
    _images: int = 0
    _steps: int = 0
    _spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds since the last logged step, waiting for data and computing."""

    @contextmanager
    def timed(self, what: Literal["data", "step"]) -> Iterator[None]:
        """Inside, this rank waits for data, or computes a step."""
        start = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - start

    def restart(self) -> None:
        """Leaves out of the timings what happened since the last step."""
        self._mark = time.perf_counter()

    def step_done(self, images: int) -> None:
        """Counts a step of all ranks."""
        now = time.perf_counter()
        self.state.seconds += now - self._mark
        self._elapsed += now - self._mark
        self._mark = now
        self._images += images
        self._steps += 1

    def logged(self) -> dict[str, float]:
        """The times of a record: images per second of all ranks since the logged step before, the mean seconds of a
        step, those in which it waited for data and those in which it computed, and the seconds in training up to
        now."""
        times = {
            "images_per_second": self._images / self._elapsed,
            "batch_time": self._elapsed / self._steps,
            "data_time": self._spent["data"] / self._steps,
            "step_time": self._spent["step"] / self._steps,
            "seconds": self.state.seconds,
        }
        self._elapsed, self._images, self._steps = 0.0, 0, 0
        self._spent.clear()
        return times
