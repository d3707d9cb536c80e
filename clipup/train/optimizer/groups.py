"""Optimizers over open_clip's parameter groups."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import timm.optim
import torch
from torch import nn

from ...clip.layer_groups import layer_groups
from ...moe.layer import moe_layers
from ...moe.weight_decay import decays
from ..parallel.whole_state import by_mesh
from .options import OptimizationOptions
from .schedule import set_lr

_DEFAULTS = (0.9, 0.98, 1e-6)
"""The betas and eps of CLIP's AdamW, and of NAdamW."""


def create_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.Optimizer:
    """The optimizer that the options select, over the model's trainable parameters in groups (``groups_of``).

    Raises:
        ValueError: no parameter of the model is trainable, timm has no such optimizer, or it cannot be created with
            these arguments.
    """
    groups = by_mesh(groups_of(model, options))
    trained = [parameter for group in groups for parameter in group["params"]]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to train")
    default = (None, None, None) if options.opt.startswith("timm/") else _DEFAULTS
    set_here = (options.beta1, options.beta2, options.eps)
    beta1, beta2, eps = (usual if value is None else value for value, usual in zip(set_here, default, strict=True))
    given = {"betas": None if beta1 is None else (beta1, beta2), "eps": eps, "momentum": options.momentum}
    given = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {"lr": options.lr, **given, **options.opt_kwargs}
    try:
        if options.opt == "adamw":
            fused = trained[0].device.type == "cuda" if options.fused is None else options.fused
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **{"fused": fused, **settings})
        elif options.opt == "nadamw":
            optimizer = torch.optim.NAdam(groups, **{"decoupled_weight_decay": True, **settings})
        else:
            settings = {"weight_decay": options.wd, **settings}
            optimizer = timm.optim.create_optimizer_v2(groups, options.opt.removeprefix("timm/"), **settings)
    except (AssertionError, RuntimeError, TypeError) as error:  # timm asserts that a GPU is there
        raise ValueError(
            f"opt_kwargs: {options.opt} cannot be created with {', '.join(settings)} ({error}); leave out what it does "
            "not take"
        ) from error
    set_lr(optimizer, options.lr)
    return optimizer


def groups_of(model: nn.Module, options: OptimizationOptions) -> list[dict[str, Any]]:
    """The trainable parameters in groups: without weight decay and with it and, with layer decay or ``moe_lr_scale``,
    by ``lr_scale``, the factor of their learning rate, the largest first. ``param_names`` are their names.

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
                f"{next(iter(named), 'logit_scale')!r}, so use '*' around a part of a name"
            )
    buckets: dict[tuple[float, bool], list[str]] = {} if scales else {(1.0, False): [], (1.0, True): []}
    for name, parameter in named.items():
        excluded = any(fnmatchcase(name, pattern) for pattern in options.wd_exclude)
        key = scales.get(name, 1.0), decays(name, parameter) and not excluded
        buckets.setdefault(key, []).append(name)
    groups = []
    for (scale, decayed), names in sorted(buckets.items(), key=lambda item: (-item[0][0], item[0][1])):
        group = {"params": [named[name] for name in names], "param_names": names}
        group |= {"weight_decay": options.wd if decayed else 0.0}
        groups.append(group | ({"lr_scale": scale} if scales else {}))
    return groups


def _lr_scales(model: nn.Module, options: OptimizationOptions) -> dict[str, float]:
    """The factors of the learning rate by parameter name; empty where none is set."""
    scales: dict[str, float] = {}
    for tower, decay in (("image", options.image_layer_decay), ("text", options.text_layer_decay)):
        if decay is None or decay == 1:
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
