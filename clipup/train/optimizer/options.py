"""Options of what is trained of a model, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...checks import check
from ...option_group import KeyValues, OptionGroup, Resumed, option

_IMAGE_UNLOCKED = {"without --lock-image": lambda group: not group.lock_image}
_TEXT_UNLOCKED = {"without --lock-text": lambda group: not group.lock_text}
_UNSCHEDULED = {"with --skip-scheduler": lambda group: group.skip_scheduler}
_NO_COOLDOWN = {"without --lr-scheduler const-cooldown": lambda group: group.lr_scheduler != "const-cooldown"}


@dataclass(kw_only=True)
class TrainedPartsOptions(OptionGroup):
    """Which parameters are trained; the others are locked. In a locked block of a sparse model the experts, the router
    and its selection bias are locked too."""

    lock_image: bool = option(False, Resumed.FREE)
    """Lock the image tower, as in LiT (arXiv 2111.07991)."""
    lock_image_unlocked_groups: int = option(0, Resumed.FREE, least=0, idle=_IMAGE_UNLOCKED)
    """Leave the last n groups of the image tower unlocked: 1 is the projection, 2 also the last block, and so on."""
    lock_image_freeze_bn_stats: bool = option(False, Resumed.FREE, idle=_IMAGE_UNLOCKED)
    """Freeze the running statistics of batch norms in the locked groups of the image tower."""
    lock_text: bool = option(False, Resumed.FREE)
    """Lock the text tower."""
    lock_text_unlocked_layers: int = option(0, Resumed.FREE, least=0, idle=_TEXT_UNLOCKED)
    """Leave the last n groups of the text tower unlocked, counted like those of the image tower."""
    lock_text_freeze_layer_norm: bool = option(False, Resumed.FREE, idle=_TEXT_UNLOCKED)
    """In a locked text tower of Hugging Face, lock the layer norms too, which are trained otherwise. In open_clip's own
    text towers they are always locked."""
    train_only: Literal["all", "routers", "experts", "sparse_layers"] = option("all", Resumed.FREE)
    """Train nothing but the routers, the experts (shared ones included) or both; in towers that are not locked."""


@dataclass(kw_only=True)
class OptimizationOptions(OptionGroup):
    """The length of the run, the optimizer and its learning rate."""

    epochs: int = option(32, Resumed.FREE, least=1)
    """Passes over the training data."""
    steps: int | None = option(None, Resumed.FREE, least=1)
    """Optimizer steps after which to stop; overrides epochs."""
    lr: float = option(5e-4, Resumed.FREE, positive=True)
    """Peak learning rate."""
    opt: str = option("adamw", Resumed.IDENTITY)
    """Optimizer: adamw, nadamw, or one of timm's as timm/NAME, such as timm/lion."""
    beta1: float | None = option(None, Resumed.FREE)
    """First beta. None: 0.9. For an optimizer of timm set both or none; None is its own default."""
    beta2: float | None = option(None, Resumed.FREE)
    """Second beta. None: 0.98, for an optimizer of timm its own default."""
    eps: float | None = option(None, Resumed.FREE)
    """Added to the denominator. None: 1e-6, for an optimizer of timm its own default."""
    momentum: float | None = option(
        None, Resumed.FREE, idle={"without --opt timm/NAME": lambda group: not group.opt.startswith("timm/")}
    )
    """Momentum, for the optimizers of timm that have one."""
    opt_kwargs: KeyValues = option(factory=dict, resumed=Resumed.FREE)
    """Further arguments of the optimizer, KEY=VALUE KEY=VALUE. On resume, an argument that needs more state than the
    checkpoint holds is refused."""
    fused: bool | None = option(None, Resumed.FREE, idle={"without --opt adamw": lambda group: group.opt != "adamw"})
    """Update all parameters in one kernel, with adamw. None: on CUDA."""
    wd: float = option(0.2, Resumed.FREE, least=0)
    """Weight decay of matrices; biases, norms and the logit scale are not decayed."""
    wd_exclude: tuple[str, ...] = option((), Resumed.FREE)
    """Patterns of the names of further parameters without weight decay, such as `*positional_embedding`."""
    image_layer_decay: float | None = option(None, Resumed.FREE, positive=True)
    """Factor by which the learning rate falls from a group of the image tower to the group below it; the projection has
    the whole learning rate. The groups are those of --lock-image-unlocked-groups."""
    text_layer_decay: float | None = option(None, Resumed.FREE, positive=True)
    """The same for the text tower."""
    moe_lr_scale: float = option(1.0, Resumed.FREE, positive=True)
    """Factor of the learning rate of routers and experts."""
    warmup: int | None = option(None, Resumed.FREE, least=0, idle=_UNSCHEDULED)
    """Steps over which the learning rate rises to lr. None: a tenth of the run, at most 10,000."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = option("cosine", Resumed.FREE, idle=_UNSCHEDULED)
    """After warm-up: down to 0 along a cosine, constant, or constant until the last epochs_cooldown epochs."""
    epochs_cooldown: int | None = option(None, Resumed.FREE, least=1, idle=_NO_COOLDOWN)
    """Epochs at the end in which const-cooldown lowers the learning rate."""
    lr_cooldown_end: float = option(0.0, Resumed.FREE, least=0, idle=_NO_COOLDOWN)
    """Learning rate at the end of the cooldown."""
    lr_cooldown_power: float = option(1.0, Resumed.FREE, positive=True, idle=_NO_COOLDOWN)
    """Power of the cooldown's polynomial; 1 is linear."""
    skip_scheduler: bool = option(False, Resumed.FREE)
    """Use a constant lr without warm-up."""
    grad_clip_norm: float | None = option(None, Resumed.FREE, positive=True)
    """Largest norm of the gradient; None does not clip."""
    max_nonfinite_steps: int = option(10, Resumed.FREE, least=0)
    """Consecutive steps that may be skipped because their gradient is NaN or infinite; one more ends the run."""

    def check(self) -> None:
        super().check()
        is_known = self.opt in ("adamw", "nadamw") or self.opt.startswith("timm/")
        check("opt", self.opt, is_known, "adamw, nadamw or timm/NAME")
        others = {"lr", "weight_decay"}.isdisjoint(self.opt_kwargs)
        check("opt_kwargs", self.opt_kwargs, others, "arguments without lr and weight_decay, which lr and wd set")
        if self.opt.startswith("timm/") and (self.beta1 is None) != (self.beta2 is None):
            raise ValueError(f"beta1 is {self.beta1} and beta2 is {self.beta2}: {self.opt} needs both or none")
        if self.lr_scheduler == "const-cooldown" and self.epochs_cooldown is None:
            raise ValueError("epochs_cooldown is missing, which lr_scheduler const-cooldown needs")
