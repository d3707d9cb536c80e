"""Options of the optimization: batches, length, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...checks import check
from .group import OptionGroup
from .key_values import KeyValues


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
    opt: str = "adamw"
    """Optimizer: adamw, nadamw, or one of timm's as timm/NAME, such as timm/lion."""
    beta1: float | None = None
    """First beta. None: 0.9, for an optimizer of timm its own default."""
    beta2: float | None = None
    """Second beta. None: 0.98, for an optimizer of timm its own default."""
    eps: float | None = None
    """Added to the denominator. None: 1e-6, for an optimizer of timm its own default."""
    momentum: float | None = None
    """Momentum, for the optimizers of timm that have one."""
    opt_kwargs: KeyValues = field(default_factory=KeyValues)
    """Further arguments of the optimizer, KEY=VALUE KEY=VALUE."""
    fused: bool | None = None
    """Update all parameters in one kernel, with adamw. None: on CUDA."""
    wd: float = 0.2
    """Weight decay of matrices; biases, norms and the logit scale are not decayed."""
    wd_exclude: tuple[str, ...] = ()
    """Patterns of the names of further parameters without weight decay, such as `*positional_embedding`."""
    image_layer_decay: float | None = None
    """Factor by which the learning rate falls from a group of the image tower to the one below it; the projection has
    the whole learning rate. The groups are those of --lock-image-unlocked-groups."""
    text_layer_decay: float | None = None
    """The same for the text tower."""
    moe_lr_scale: float = 1.0
    """Factor of the learning rate of routers and experts."""
    warmup: int | None = None
    """Steps over which the learning rate rises to lr. None: a tenth of the run, at most 10,000."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    """After warm-up: down to 0 along a cosine, constant, or constant until the last epochs_cooldown epochs."""
    epochs_cooldown: int | None = None
    """Epochs at the end in which const-cooldown lowers the learning rate."""
    lr_cooldown_end: float = 0.0
    """Learning rate at the end of the cooldown."""
    lr_cooldown_power: float = 1.0
    """Power of the cooldown's polynomial; 1 is linear."""
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
        for name in ("seed", "warmup", "wd", "max_nonfinite_steps", "lr_cooldown_end"):
            value = getattr(self, name)
            check(name, value, value is None or value >= 0, "0 or more")
        check("steps", self.steps, self.steps is None or self.steps >= 1, "at least 1")
        check("lr", self.lr, self.lr > 0, "a positive number")
        largest = self.grad_clip_norm
        check("grad_clip_norm", largest, largest is None or largest > 0, "positive, or None")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            check(name, value, value is None or 0 <= value < 1, "in [0, 1)")
        check("eps", self.eps, self.eps is None or self.eps >= 0, "0 or more")
        for name in ("image_layer_decay", "text_layer_decay"):
            value = getattr(self, name)
            check(name, value, value is None or 0 < value <= 1, "in (0, 1]")
        scale = self.moe_lr_scale
        check("moe_lr_scale", scale, scale > 0, "a positive number")
        check("lr_cooldown_power", self.lr_cooldown_power, self.lr_cooldown_power > 0, "positive")
        self._check_optimizer()
        self._check_cooldown()

    def _check_optimizer(self) -> None:
        known = self.opt in ("adamw", "nadamw") or self.opt.startswith("timm/")
        check("opt", self.opt, known, "adamw, nadamw or timm/NAME")
        if not self.opt.startswith("timm/"):
            check("momentum", self.momentum, self.momentum is None, f"left out: {self.opt} has none")
        elif (self.beta1 is None) != (self.beta2 is None):
            raise ValueError(
                f"beta1={self.beta1} and beta2={self.beta2}: set both, or none to keep those of {self.opt}"
            )
        if self.fused:
            check("fused", self.fused, self.opt == "adamw", f"left out: it is for opt adamw, not for {self.opt}")

    def _check_cooldown(self) -> None:
        if self.lr_scheduler == "const-cooldown":
            epochs = self.epochs_cooldown
            check("epochs_cooldown", epochs, epochs is not None and epochs >= 1, "at least 1 with const-cooldown")
        elif self.epochs_cooldown is not None:
            raise ValueError(
                f"epochs_cooldown={self.epochs_cooldown} has no effect with lr_scheduler {self.lr_scheduler!r}; use "
                "const-cooldown"
            )
