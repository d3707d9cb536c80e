"""The length of a run, and open_clip_train's schedules of the learning rate over it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .options import OptimizationOptions

_LONGEST_WARMUP = 10_000


@dataclass
class Schedule:
    """How long a run is, by ``options.steps`` or else by ``options.epochs``, and the learning rate of each step: a
    linear warm-up, then a cosine to 0, a constant, or a constant with a cooldown in the last epochs."""

    options: OptimizationOptions
    steps_of_epoch: int
    steps_before: int = 0
    """Extra steps of a run whose epochs had another length before: the steps done, minus those that epochs of today's
    length would have had."""

    @property
    def steps(self) -> int:
        return self.options.steps or self.steps_before + self.options.epochs * self.steps_of_epoch

    @property
    def warmup(self) -> int:
        """``options.warmup``, or its default in a run of this length."""
        default = min(_LONGEST_WARMUP, max(1, self.steps // 10))
        return default if self.options.warmup is None else self.options.warmup

    @property
    def cooldown(self) -> int:
        """The steps at the end in which the rate of a constant schedule falls."""
        return (
            self.steps_of_epoch * (self.options.epochs_cooldown or 0)
            if self.options.lr_scheduler == "const-cooldown"
            else 0
        )

    def notes(self) -> list[str]:
        """Notes for the log on a warm-up or a cooldown that takes longer than the run."""
        parts = {} if self.options.skip_scheduler else {"warmup": self.warmup, "epochs_cooldown": self.cooldown}
        return [
            f"{name}: {steps} steps are more than the {self.steps} of the run, which has only a part of the schedule: "
            f"its highest learning rate is {max(map(self.rate, range(self.steps))):g}, and lr is {self.options.lr:g}"
            for name, steps in parts.items()
            if steps > self.steps
        ]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, without any group's ``lr_scale``."""
        options, warmup = self.options, self.warmup
        if options.skip_scheduler:
            return options.lr
        if step < warmup:
            return options.lr * (step + 1) / warmup
        if options.lr_scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup))) * options.lr
        begin = self.steps - self.cooldown
        if step < begin:
            return options.lr
        left = (1 - (step - begin) / self.cooldown) ** options.lr_cooldown_power
        return left * (options.lr - options.lr_cooldown_end) + options.lr_cooldown_end


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate without any group's ``lr_scale``."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
