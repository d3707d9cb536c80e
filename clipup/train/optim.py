"""AdamW with open_clip's parameter groups, and open_clip_train's learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..moe.weight_decay import parameter_groups
from .options import TrainOptions


def adamw(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """
    Raises:
        ValueError: no parameter of the model is trainable.
    """
    groups = parameter_groups(model, options.wd)
    if not any(group["params"] for group in groups):
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to train")
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state dict, with the names of the parameters in ``param_names`` of its groups."""
    state = optimizer.state_dict()
    named = zip(state["param_groups"], _names(optimizer, model), strict=True)
    return {**state, "param_groups": [{**group, "param_names": names} for group, names in named]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Loads moments and step counts into a new optimizer, by the names of the parameters. Its groups keep their own
    settings, such as the learning rate, and a parameter that the state does not have starts without moments.

    Args:
        state: as ``optimizer_state`` returns it. One without names, such as open_clip_train's, is taken in the order of
            the groups.

    Raises:
        ValueError: a state without names has groups of other sizes.
    """
    own = _names(optimizer, model)
    saved = state["param_groups"]
    if not all("param_names" in group for group in saved):
        sizes, wanted = ([len(names) for names in groups] for groups in ([group["params"] for group in saved], own))
        if sizes != wanted:
            raise ValueError(
                f"the optimizer of the checkpoint has groups of {', '.join(map(str, sizes))} parameters without names, "
                f"this run has {', '.join(map(str, wanted))}; train the same parameters in the same groups"
            )
        saved = [{**group, "param_names": names} for group, names in zip(saved, own, strict=True)]
    index = {name: at for group in saved for name, at in zip(group["param_names"], group["params"], strict=True)}
    groups, states = [], {}
    for group, names in zip(optimizer.param_groups, own, strict=True):
        known = next((one for one in saved if not set(names).isdisjoint(one["param_names"])), {})
        first = sum(len(one["params"]) for one in groups)
        states |= {
            first + position: state["state"][index[name]]
            for position, name in enumerate(names)
            if index.get(name) in state["state"]
        }
        counted = {key: value for key, value in known.items() if key not in group and key != "param_names"}
        groups.append({**counted, **group, "params": list(range(first, first + len(names)))})
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The parameters' names by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


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
