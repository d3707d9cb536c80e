"""AdamW with open_clip's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .options import TrainOptions

_SETTINGS = ("lr", "betas", "eps", "weight_decay")
_WITHOUT_DECAY = ("bn", "ln", "bias", "logit_scale")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to tensors of two dimensions or more whose names hold none of bn, ln, bias and
    logit_scale (open_clip's rule, under which an expert layer's [E, H] ``in_bias`` has none)."""
    return parameter.ndim >= 2 and not any(part in name for part in _WITHOUT_DECAY)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters without weight decay, then those with it."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if not decays(name, parameter)], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if decays(name, parameter)], "weight_decay": weight_decay},
    ]


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
