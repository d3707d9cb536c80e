"""AdamW with open_clip's parameter groups, and open_clip_train's learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..moe.weight_decay import parameter_groups
from .options import TrainOptions

_SETTINGS = ("lr", "betas", "eps", "weight_decay")


def adamw(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """
    Raises:
        ValueError: no parameter of the model is trainable.
    """
    groups = parameter_groups(model, options.wd)
    if not any(group["params"] for group in groups):
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to train")
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state dict's moments and step counts. The groups keep their own learning rate, betas, eps and weight
    decay, which may differ from those that the state was saved with."""
    own = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def schedule(options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> Callable[[int], None]:
    """A function of the step, from 0 on, that sets the learning rate of every group: a linear warm-up, then a cosine to
    0 or a constant."""

    def set_lr(step: int) -> None:
        if step < options.warmup:
            lr = options.lr * (step + 1) / options.warmup
        elif options.lr_scheduler == "const":
            lr = options.lr
        else:
            done, steps = step - options.warmup, total_steps - options.warmup
            lr = 0.5 * (1 + math.cos(math.pi * done / steps)) * options.lr
        for group in optimizer.param_groups:
            group["lr"] = lr

    return set_lr


def warmup_warning(options: TrainOptions, total_steps: int) -> list[str]:
    """A line for the log if the run ends before its learning rate has risen to ``options.lr``."""
    if options.skip_scheduler or options.warmup <= total_steps:
        return []
    default = " (the default)" if options.warmup == TrainOptions.warmup else ""
    reached = total_steps / options.warmup
    return [
        f"a warm-up of {options.warmup} steps{default} is longer than this run of {total_steps}: the learning rate "
        f"rises to {options.lr * reached:.3g} only, {100 * reached:.3g} % of lr; set --warmup"
    ]
