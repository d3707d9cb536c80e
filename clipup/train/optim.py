"""AdamW with open_clip's parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip_train.scheduler import const_lr, cosine_lr
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
    """Takes over a state dict's moments and steps. The groups keep their own learning rate, betas, eps and weight
    decay, which may differ from those that the state was saved with."""
    own = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def schedule(options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> Callable[[int], float]:
    """A function of the step that sets the learning rate of every group."""
    make = {"cosine": cosine_lr, "const": const_lr}[options.lr_scheduler]
    return make(optimizer, options.lr, options.warmup, total_steps)
