"""Optimizers over open_clip's parameter groups, their state by parameter name, and open_clip_train's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from ..checks import check
from ..clip.layer_groups import layer_groups
from ..moe.layer import moe_layers
from ..moe.weight_decay import decays
from .options import TrainOptions
from .ranks.whole_state import PLACE, by_mesh, names_of, shard_like, whole_optimizer_state

_BETAS, _EPS = (0.9, 0.98), 1e-6
"""CLIP's, of AdamW and NAdamW."""
_LONGEST_WARMUP = 10_000
_OF_A_RUN = ("param_names", "lr_scale", *PLACE)
"""Of a saved group, what a run sets anew; the rest, such as a count of steps, is the optimizer's own."""


def create_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that the options select, over the model's trainable parameters in groups (``groups_of``).

    Raises:
        ValueError: no parameter of the model is trainable, or timm has no such optimizer or cannot create it.
    """
    groups = by_mesh(groups_of(model, options))
    trained = [parameter for group in groups for parameter in group["params"]]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to train")
    if options.opt.startswith("timm/"):
        optimizer = _timm_optimizer(groups, options)
    else:
        settings: dict[str, Any] = {"lr": options.lr, "betas": betas(options), "eps": _EPS}
        settings |= {} if options.eps is None else {"eps": options.eps}
        kind: Any = torch.optim.NAdam
        if options.opt == "adamw":
            kind = torch.optim.AdamW
            settings["fused"] = trained[0].device.type == "cuda" if options.fused is None else options.fused
        else:
            settings["decoupled_weight_decay"] = True
        optimizer = kind(groups, **{**settings, **options.opt_kwargs})
    _set_lr(optimizer, options.lr)
    return optimizer


def betas(options: TrainOptions) -> tuple[float, float]:
    """Those of AdamW and NAdamW, where the defaults are CLIP's."""
    first, second = _BETAS
    return first if options.beta1 is None else options.beta1, second if options.beta2 is None else options.beta2


def _timm_optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.wd}
    settings |= {} if options.beta1 is None else {"betas": (options.beta1, options.beta2)}
    settings |= {} if options.eps is None else {"eps": options.eps}
    settings |= {} if options.momentum is None else {"momentum": options.momentum}
    name = options.opt.removeprefix("timm/")
    check("opt", options.opt, name in timm.optim.list_optimizers(), "adamw, nadamw or timm/NAME of timm.optim")
    if timm.optim.get_optimizer_info(name).second_order:
        raise ValueError(f"opt {options.opt!r} needs second derivatives, which the ops of sparse layers do not have")
    return timm.optim.create_optimizer_v2(groups, name, **{**settings, **options.opt_kwargs})


def groups_of(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """The trainable parameters in groups: without weight decay and with it and, with layer decay or ``moe_lr_scale``,
    by ``lr_scale``, the factor of their learning rate, the largest first.

    A parameter has no weight decay by the rule of ``clipup.parameter_groups``, or if a pattern of ``wd_exclude``
    matches its name.

    Raises:
        ValueError: a pattern matches no parameter, layer decay is set for a tower without blocks, or ``moe_lr_scale``
            for a model without sparse layers.
    """
    scales = _lr_scales(model, options)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in options.wd_exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(
                f"wd_exclude: {pattern!r} matches no parameter; a pattern is compared with whole names such as "
                f"{next(iter(named), 'logit_scale')!r}, so use '*' around a part of one"
            )
    buckets: dict[tuple[float, bool], list[nn.Parameter]] = {} if scales else {(1.0, False): [], (1.0, True): []}
    for name, parameter in named.items():
        excluded = any(fnmatchcase(name, pattern) for pattern in options.wd_exclude)
        key = scales.get(name, 1.0), decays(name, parameter) and not excluded
        buckets.setdefault(key, []).append(parameter)
    groups = []
    for (scale, decayed), parameters in sorted(buckets.items(), key=lambda item: (-item[0][0], item[0][1])):
        group = {"params": parameters, "weight_decay": options.wd if decayed else 0.0}
        groups.append(group | ({"lr_scale": scale} if scales else {}))
    return groups


def _lr_scales(model: nn.Module, options: TrainOptions) -> dict[str, float]:
    """The factors of the learning rate by parameter name; empty where none is set."""
    scales: dict[str, float] = {}
    for tower in ("image", "text"):
        decay = getattr(options, f"{tower}_layer_decay")
        if decay in (None, 1):
            continue
        groups = layer_groups(model, tower)
        if len(groups) == 1:
            raise ValueError(f"{tower}_layer_decay={decay}: the {tower} tower has no list of blocks, so no layers")
        for depth, group in enumerate(reversed(groups)):
            scales |= dict.fromkeys(group, decay**depth)
    if options.moe_lr_scale != 1:
        layers = moe_layers(model)
        if not layers:
            raise ValueError(
                f"moe_lr_scale={options.moe_lr_scale:g}: the model has no sparse layers; leave it out, or make the "
                "model sparse with moe"
            )
        for prefix, layer in layers.items():
            for name, _ in layer.named_parameters(prefix):
                scales[name] = options.moe_lr_scale * scales.get(name, 1.0)
    return scales


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The optimizer's state dict, with the names of the parameters in ``param_names`` of its groups.

    It is a collective if the model is sharded, and the same as for a model that is not; without ``keep`` nothing is
    kept of the tensors that are gathered.
    """
    state = whole_optimizer_state(optimizer, keep)
    named = zip(state["param_groups"], names_of(optimizer, model), strict=True)
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
    wanted = names_of(optimizer, model)
    saved = state["param_groups"]
    if not all("param_names" in group for group in saved):
        saved = [{**group, "param_names": names} for group, names in zip(saved, wanted, strict=True)]
    index = {name: at for group in saved for name, at in zip(group["param_names"], group["params"], strict=True)}
    name_of: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = continued_groups(optimizer, name_of, saved)
    states: dict[int, Any] = {}
    for group, of_group in zip(optimizer.param_groups, groups, strict=True):
        for position, parameter in zip(of_group["params"], group["params"], strict=True):
            moments = state["state"].get(index.get(name_of[parameter]))
            if moments is not None:
                states[position] = {key: shard_like(parameter, value) for key, value in moments.items()}
    optimizer.load_state_dict({**state, "state": states, "param_groups": groups})


def continued_groups(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of the optimizer's state dict: its own settings, and of a saved group with one of its parameters what
    its own group does not have yet, such as a count of steps.

    Args:
        names: of the parameters.
        saved: settings of groups, with ``param_names``.
    """
    groups = []
    for own, group in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        own_names = {names[parameter] for parameter in own["params"]}
        known: dict[str, Any] = next((one for one in saved if not own_names.isdisjoint(one["param_names"])), {})
        counted = {key: value for key, value in known.items() if key not in group and key not in _OF_A_RUN}
        groups.append({**counted, **group})
    return groups


def schedule(
    options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int, steps_of_epoch: int
) -> Callable[[int], None]:
    """A function of the step, from 0 on, that sets the learning rate of every group: a linear warm-up, then a cosine to
    0, a constant, or a constant with a cooldown in the last epochs."""
    cooldown = (options.epochs_cooldown or 0) * steps_of_epoch
    warmup = warmup_steps(options, total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return options.lr * (step + 1) / warmup
        if options.lr_scheduler == "cosine":
            done, steps = step - warmup, total_steps - warmup
            return 0.5 * (1 + math.cos(math.pi * done / steps)) * options.lr
        begin = total_steps - cooldown
        if options.lr_scheduler == "const" or step < begin:
            return options.lr
        left = (1 - (step - begin) / cooldown) ** options.lr_cooldown_power
        return left * (options.lr - options.lr_cooldown_end) + options.lr_cooldown_end

    return lambda step: _set_lr(optimizer, rate(step))


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """``options.warmup``, or its default in a run of this length."""
    return min(_LONGEST_WARMUP, max(1, total_steps // 10)) if options.warmup is None else options.warmup


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate without any group's ``lr_scale``."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def schedule_warnings(options: TrainOptions, total_steps: int, steps_of_epoch: int) -> list[str]:
    """Lines for the log if the run is too short for its warm-up or its cooldown."""
    if options.skip_scheduler:
        return []
    lines = []
    warmup = warmup_steps(options, total_steps)
    if warmup > total_steps:
        reached = total_steps / warmup
        lines.append(
            f"a warm-up of {warmup} steps is longer than this run of {total_steps}: the learning rate "
            f"rises to {options.lr * reached:.3g} only, {100 * reached:.3g} % of lr; set a smaller --warmup"
        )
    cooldown = (options.epochs_cooldown or 0) * steps_of_epoch
    if options.epochs_cooldown and cooldown > total_steps - warmup:
        lines.append(
            f"a cooldown of {cooldown} steps is longer than what this run of {total_steps} has after its warm-up: the "
            "learning rate drops when it begins; set a smaller --epochs-cooldown"
        )
    return lines
