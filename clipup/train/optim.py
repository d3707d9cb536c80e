"""AdamW with open_clip's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..weight_decay import parameter_groups
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
