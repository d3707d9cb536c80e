"""Options of the optimization: batches, length, optimizer, schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...checks import check
from .group import OptionGroup


@dataclass(kw_only=True)
class OptimizationOptions(OptionGroup):
    """Batches, the length of the run, the optimizer and its learning rate."""

    batch_size: int = 64
    """Images per batch and rank."""
    accum_freq: int = 1
    """Batches per step: the loss is over all of them, with the memory of one."""
    epochs: int = 32
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps after which to stop; overrides epochs."""
    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.98
    """AdamW's second beta."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    wd: float = 0.2
    """Weight decay of matrices; biases, norms and the logit scale are not decayed."""
    warmup: int = 10000
    """Steps over which the learning rate rises to lr."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """After warm-up: down to 0 along a cosine, or constant."""
    skip_scheduler: bool = False
    """Use a constant lr without warm-up."""
    grad_clip_norm: float | None = None
    """Largest norm of the gradient; None does not clip."""
    max_nonfinite_steps: int = 10
    """Consecutive steps that may be skipped because their gradient is NaN or infinite; one more ends the run."""
    seed: int = 0
    """Seed of weights, data order and noise."""

    def check(self) -> None:
        for name in ("batch_size", "accum_freq", "epochs"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "warmup", "wd", "eps", "max_nonfinite_steps"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("steps", self.steps, self.steps is None or self.steps >= 1, "at least 1")
        check("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a positive number")
        largest = self.grad_clip_norm
        check("grad_clip_norm", largest, largest is None or largest > 0, "positive, or None")
        for name in ("beta1", "beta2"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
