"""Which parameters of a model are trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from open_clip.hf_model import HFTextEncoder
from torch import nn

from ...clip.layer_groups import layer_groups
from ...clip.towers import tower_module
from ...moe.layer import moe_layers
from .options import TrainedPartsOptions


def lock_parts(model: nn.Module, options: TrainedPartsOptions) -> None:
    """Sets ``requires_grad`` of the model's parameters as the options say. Sparse layers without a trained parameter
    run in evaluation mode, also while the model trains: they drop no more than evaluation does, and add no noise.

    Raises:
        ValueError: more groups should stay unlocked than a tower has, or ``train_only`` is set for a dense model.
    """
    if options.lock_image:
        _lock(model, "image", options.lock_image_unlocked_groups, "lock_image_unlocked_groups")
        if options.lock_image_freeze_bn_stats:
            image = tower_module(model, "image")[1]
            _evaluate_locked(each for each in image.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm))
    if options.lock_text:
        keep_norms = not options.lock_text_freeze_layer_norm and isinstance(
            tower_module(model, "text")[1], HFTextEncoder
        )
        _lock(model, "text", options.lock_text_unlocked_layers, "lock_text_unlocked_layers", keep_norms)
    if options.train_only != "all":
        _lock_all_but(model, options.train_only)
    _evaluate_locked(moe_layers(model).values())


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


def _evaluate_locked(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.register_forward_pre_hook(_evaluate_if_locked)


def _evaluate_if_locked(module: nn.Module, inputs: Any) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()
