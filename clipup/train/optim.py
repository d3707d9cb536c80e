"""What is trained and how: locked parameters, optimizers over open_clip's parameter groups, and
open_clip_train's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import timm.optim
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn

from ..clip.layer_groups import layer_groups
from ..clip.towers import tower_module
from ..moe.layer import moe_layers
from ..moe.weight_decay import decays
from .options import TrainOptions
from .ranks.whole_state import by_mesh

_DEFAULTS = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
"""CLIP's, of AdamW and NAdamW."""
_LONGEST_WARMUP = 10_000


def lock_parts(model: nn.Module, options: TrainOptions) -> None:
    """Sets ``requires_grad`` of the model's parameters as the options say.

    Raises:
        ValueError: more groups should stay unlocked than a tower has, or ``train_only`` is set for a dense model.
    """
    if options.lock_image:
        _lock(model, "image", options.lock_image_unlocked_groups, "lock_image_unlocked_groups")
        if options.lock_image_freeze_bn_stats:
            _keep_statistics(tower_module(model, "image")[1])
    if options.lock_text:
        keep_norms = not options.lock_text_freeze_layer_norm and isinstance(
            tower_module(model, "text")[1], HFTextEncoder
        )
        _lock(model, "text", options.lock_text_unlocked_layers, "lock_text_unlocked_layers", keep_norms)
    if options.train_only != "all":
        _lock_all_but(model, options.train_only)


def _lock(model: nn.Module, tower: str, unlocked: int, option: str, keep_norms: bool = False) -> None:
    groups = layer_groups(model, tower)
    if unlocked >= len(groups):
        raise ValueError(
            f"{option}={unlocked} leaves nothing of the {tower} tower locked, which has {len(groups)} groups (one: it "
            "can only be locked as a whole); unlock fewer, or do not lock it"
        )
    for group in groups[: len(groups) - unlocked]:
        for name, parameter in group.items():
            if not (keep_norms and "LayerNorm" in name.split(".")):
                parameter.requires_grad_(False)


def _lock_all_but(model: nn.Module, trained: str) -> None:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"train_only={trained!r} needs a sparse model, and this one is dense; make it sparse with moe")
    routers = {parameter for layer in layers.values() for parameter in layer.router.parameters()}
    experts = {parameter for layer in layers.values() for parameter in layer.parameters()} - routers
    wanted = {"routers": routers, "experts": experts, "sparse_layers": routers | experts}[trained]
    for parameter in set(model.parameters()) - wanted:
        parameter.requires_grad_(False)


def _keep_statistics(tower: nn.Module) -> None:
    """Lets batch norms whose parameters are locked run in evaluation mode, also while the model trains."""
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, inputs: Any) -> None:
    module.eval()


def create_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that the options select, over the model's trainable parameters in groups (``groups_of``).

    Raises:
        ValueError: no parameter of the model is trainable, or timm has no such optimizer or cannot create it.
    """
    groups = by_mesh(groups_of(model, options))
    trained = [parameter for group in groups for parameter in group["params"]]
    if not trained:
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to train")
    given = {name: getattr(options, name) for name in ("beta1", "beta2", "eps", "momentum")}
    given = {name: value for name, value in given.items() if value is not None}
    if not options.opt.startswith("timm/"):
        given = _DEFAULTS | given
    if "beta1" in given:
        given["betas"] = given.pop("beta1"), given.pop("beta2", None)
    settings: dict[str, Any] = {"lr": options.lr, **given, **options.opt_kwargs}
    if options.opt == "adamw":
        fused = trained[0].device.type == "cuda" if options.fused is None else options.fused
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **{"fused": fused, **settings})
    elif options.opt == "nadamw":
        optimizer = torch.optim.NAdam(groups, **{"decoupled_weight_decay": True, **settings})
    else:
        settings = {"weight_decay": options.wd, **settings}
        optimizer = timm.optim.create_optimizer_v2(groups, options.opt.removeprefix("timm/"), **settings)
    _set_lr(optimizer, options.lr)
    return optimizer


def groups_of(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
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
                f"{next(iter(named), 'logit_scale')!r}, so use '*' around a part of one"
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
