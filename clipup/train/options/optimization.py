"""Options of the optimization: batches, length, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...checks import check
from ...option_group import KeyValues, OptionGroup


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
    """First beta. None: 0.9. For an optimizer of timm set both or none; None is its own default."""
    beta2: float | None = None
    """Second beta. None: 0.98, for an optimizer of timm its own default."""
    eps: float | None = None
    """Added to the denominator. None: 1e-6, for an optimizer of timm its own default."""
    momentum: float | None = None
    """Momentum, for the optimizers of timm that have one."""
    opt_kwargs: KeyValues = field(default_factory=dict)
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
        self.at_least(0, "warmup", "wd", "max_nonfinite_steps", "lr_cooldown_end", "seed")
        self.at_least(1, "epochs", "steps", "epochs_cooldown", "batch_size", "accum_freq")
        self.positive("lr", "moe_lr_scale", "lr_cooldown_power", "grad_clip_norm")
        self.positive("image_layer_decay", "text_layer_decay")
        known = self.opt in ("adamw", "nadamw") or self.opt.startswith("timm/")
        check("opt", self.opt, known, "adamw, nadamw or timm/NAME")
        if self.opt.startswith("timm/") and (self.beta1 is None) != (self.beta2 is None):
            raise ValueError(f"beta1 is {self.beta1} and beta2 is {self.beta2}: {self.opt} needs both or none")
        if self.lr_scheduler == "const-cooldown" and self.epochs_cooldown is None:
            raise ValueError("epochs_cooldown is missing, which lr_scheduler const-cooldown needs")
