"""Compares a model with the one that a ``model_cfg`` describes, which is made for it without weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from ..checks import shown
from ..moe.config import MoEConfig
from ..upcycling.upcycle import upcycle
from .hub import OF_RANDOM_WEIGHTS, suppress_log_lines
from .model_directory import CONFIG_NAME
from .timm_size import resize_tower

_SIZES = ("image_size", "context_length")
_ATTRIBUTES = (
    *("num_heads", "heads", "pool_type", "text_pool_type", "eos_id", "text_eos_id", "pad_id", "final_ln_after_pool"),
    *("scaled_cosine", "eps", "norm_eps", "approximate", "activation"),
)
"""Of modules: what a function depends on besides weights, as open_clip, timm, torch and our layers name it."""
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_BY_NAME = "hf_model_name"
_NO_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_COUNTS = "num_batches_tracked"
_SHOWN = 3


def check_describes(model: nn.Module, model_cfg: dict[str, Any], moe_config: MoEConfig | None = None) -> None:
    """Checks that loading a config and the model's weights would give the model's function again: names and shapes of
    the weights, activations, heads, masks, sizes of images and texts, and whether there is a logit bias.

    A text tower of Hugging Face is not compared: its config is found by its name, perhaps on the hub.

    Raises:
        ValueError: it would not, or open_clip cannot make a model of the config.
    """
    found = differences(model, model_cfg, moe_config)
    if found:
        raise ValueError(
            f"model_cfg describes another model than the one that is given: {listed(found)}. Pass the config that the "
            "model was created with: clipup.get_model_config(NAME), changed by the arguments of its creation "
            "(force_quick_gelu: quick_gelu; force_image_size: vision_cfg.image_size; force_context_length: "
            "text_cfg.context_length; init_logit_bias)"
        )


def differences(
    model: nn.Module,
    model_cfg: dict[str, Any],
    moe_config: MoEConfig | None = None,
    weights_replaced: bool = False,
    activations: bool = True,
) -> list[str]:
    """What a config's model has otherwise than this one, in words: "is" in the model and "describes" in the config.

    Args:
        moe_config: of the model's sparse layers.
        weights_replaced: leave out what weights of that config bring or are resized for: names, shapes and sizes.
        activations: compare these too.
    """
    text_by_name = (model_cfg.get("text_cfg") or {}).get(_BY_NAME) is not None
    described = _skeleton(model_cfg, moe_config, text_by_name, dict(model.named_parameters()))
    ours, theirs = _modules(model, text_by_name), _modules(described, text_by_name)
    found = [] if weights_replaced else _of_weights(model, described, text_by_name)
    attributes = _ATTRIBUTES if weights_replaced else _ATTRIBUTES + _SIZES
    for name in [name for name in ours if name in theirs]:
        one, other = _function(ours[name], attributes), _function(theirs[name], attributes)
        if activations and (_is_activation(ours[name]) or _is_activation(theirs[name])):
            one["class"], other["class"] = type(ours[name]).__name__, type(theirs[name]).__name__
        found += [
            f"{what} of {name or 'the model'} is {shown(one[what])}, the config describes {shown(other[what])}"
            for what in one
            if what in other and one[what] != other[what]
        ]
    return found


def listed(found: list[str]) -> str:
    """The first of many differences, for a message."""
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + f"; and {more} more" * (more > 0)


def _skeleton(
    model_cfg: dict[str, Any], moe_config: MoEConfig | None, without_text: bool, weights: Mapping[str, Tensor]
) -> nn.Module:
    """The model of a config on the meta device.

    Args:
        without_text: with a text tower of one small block, which nothing compares.
        weights: of the model that it is compared with, for which an image tower of timm is resized.
    """
    if without_text:
        model_cfg = {**model_cfg, "text_cfg": _NO_TEXT}
        towers = () if moe_config is None else tuple(tower for tower in moe_config.towers or () if tower == "image")
        moe_config = moe_config.replace(towers=towers) if moe_config is not None and towers else None
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG_NAME).write_text(json.dumps({"model_cfg": model_cfg}), encoding="utf-8")
        try:
            with torch.device("meta"), suppress_log_lines(OF_RANDOM_WEIGHTS):
                model = open_clip.create_model(
                    f"local-dir:{directory}", load_weights=False, device="meta", pretrained_text=False
                )
                resize_tower(model, model_cfg, weights)
        except Exception as error:  # open_clip and timm have no common class for what a wrong option raises
            raise ValueError(
                f"model_cfg: open_clip could not create a model of it: {type(error).__name__}: {error}"
            ) from error
    return model if moe_config is None else upcycle(model, moe_config, inplace=True)


def _of_weights(model: nn.Module, described: nn.Module, text_by_name: bool) -> list[str]:
    ours, theirs = (
        {
            name: list(value.shape)
            for name, value in one.state_dict().items()
            if not name.endswith(_COUNTS) and not (text_by_name and _is_of_text(name))
        }
        for one in (model, described)
    )
    found = [f"the model has {name}, the config describes none" for name in ours if name not in theirs]
    found += [f"the model has no {name}, the config describes one" for name in theirs if name not in ours]
    found += [
        f"{name} is {ours[name]}, the config describes {theirs[name]}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    return found


def _modules(model: nn.Module, text_by_name: bool) -> dict[str, nn.Module]:
    return {name: one for name, one in model.named_modules() if not (text_by_name and (not name or _is_of_text(name)))}


def _is_of_text(name: str) -> bool:
    return not name.startswith(("visual", "logit_"))


def _function(module: nn.Module, attributes: tuple[str, ...]) -> dict[str, Any]:
    """What a module computes besides its weights, by the names of attributes."""
    found = {name: _plain(vars(module)[name]) for name in attributes if name in vars(module)}
    if "attn_mask" in module._buffers or "attn_mask" in vars(module):
        found["attn_mask"] = "none" if getattr(module, "attn_mask", None) is None else "causal"
    return found


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in _ACTIVATIONS or isinstance(module, QuickGELU)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(value)
    return value if isinstance(value, str | int | float | None) else type(value).__name__
