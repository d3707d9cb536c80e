"""``model_cfg``: differences between two configs, and between a model and the model that a config describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import open_clip
import timm
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from ..checks import shown
from ..moe.config import MoEConfig
from ..upcycling.upcycle import upcycle
from . import hub, model_directory
from .state_dicts import listed

_TOWERS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_FORCED_FIELDS = {
    "force_image_size": ("vision_cfg", "image_size"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_context_length": ("text_cfg", "context_length"),
}
_FORCED_FLAGS = {"force_quick_gelu": "quick_gelu", "force_custom_text": "custom_text"}
FORCED = (*_FORCED_FIELDS, *_FORCED_FLAGS)
"""Arguments of open_clip's factory that change the model."""
_NOT_COMPARED = {
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),  # the weights determine these
    *("custom_text", "output_dict", "cast_dtype"),  # the same function
    *("patch_dropout", "timm_drop", "timm_drop_path"),  # in training only
    *("timm_model_pretrained", "hf_model_pretrained"),  # where weights that are replaced come from
}
_ABSENT: tuple[Any, ...] = (None, False, "", {})
_SIZES = ("image_size", "context_length")
_ATTRIBUTES = (
    *("num_heads", "heads", "pool_type", "text_pool_type", "eos_id", "text_eos_id", "pad_id", "final_ln_after_pool"),
    *("scaled_cosine", "eps", "norm_eps", "approximate", "activation"),
)
"""Attributes of modules that a function depends on besides weights, as open_clip, timm, torch and our layers name them.
"""
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_NO_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_COUNTS = "num_batches_tracked"
_POSITIONS = "visual.trunk.pos_embed"


def overridden(model_cfg: dict[str, Any], forced: dict[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of the model that open_clip's factory makes of this config under its ``force_*`` arguments."""
    changed = dict(model_cfg)
    for argument, (tower, field) in _FORCED_FIELDS.items():
        if forced.get(argument) is not None:
            changed[tower] = {**changed[tower], field: forced[argument]}
    return changed | {field: True for argument, field in _FORCED_FLAGS.items() if forced.get(argument)}


def with_logit_bias(model_cfg: dict[str, Any], logit_bias: object) -> dict[str, Any]:
    """The config, completed by what makes open_clip create a logit bias, if the model has one: weights decide about it,
    not the name of a model.

    Args:
        logit_bias: the model's parameter, or that of its weights; None if it has none.
    """
    if logit_bias is None or model_cfg.get("init_logit_bias") is not None:
        return model_cfg
    return {**model_cfg, "init_logit_bias": 0.0}  # the weights replace it


def differing(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields, such as "vision_cfg.head_width", in which two configs give models that compute something else, with
    both values. Missing fields have open_clip's defaults; fields that the weights determine are not compared."""
    first, second = _fields(left), _fields(right)
    return {
        field: (first.get(field), second.get(field))
        for field in sorted(first.keys() | second.keys())
        if first.get(field) != second.get(field)
    }


def _fields(model_cfg: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in model_cfg.items() if name not in _TOWERS}
    for tower, options in _TOWERS.items():
        if model_cfg.get(tower) is not None:
            values = {field.name: field.default for field in dataclasses.fields(options)} | model_cfg[tower]
            fields |= {f"{tower}.{name}": value for name, value in values.items()}
    return {
        field: _plain(value)
        for field, value in fields.items()
        if field.rpartition(".")[2] not in _NOT_COMPARED and value not in _ABSENT
    }


def _plain(value: Any) -> Any:
    """A value of a config or of a module in one form, of several that mean the same."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    return value if isinstance(value, str | int | float | dict | None) else type(value).__name__


def check_describes(model: nn.Module, model_cfg: dict[str, Any], moe_config: MoEConfig | None = None) -> None:
    """Checks that loading a config and the model's weights would give the model's function again: names and shapes of
    the weights, activations, heads, masks, sizes of images and texts, and whether there is a logit bias.

    A text tower of Hugging Face is not compared: its config is found by its name, perhaps on the hub.

    Raises:
        ValueError: it would not.
    """
    if unequal := differences(model, model_cfg, moe_config):
        raise ValueError(
            f"model_cfg describes another model than the one that is given: {listed(unequal)}. Pass the config that "
            "the model was created with: clipup.get_model_config(NAME), changed by the arguments of its creation "
            "(force_quick_gelu: quick_gelu; force_image_size: vision_cfg.image_size; force_context_length: "
            "text_cfg.context_length; init_logit_bias)"
        )


def differences(
    model: nn.Module, model_cfg: dict[str, Any], moe_config: MoEConfig | None = None, sizes: bool = True
) -> list[str]:
    """Differences between a model and the model that a config describes, in words.

    Args:
        moe_config: of the model's sparse layers.
        sizes: compare shapes of weights and sizes of inputs too. Without, what weights bring or are resized for.
    """
    compared: tuple[str, ...] = ("",)
    if model_cfg["text_cfg"].get("hf_model_name") is not None:
        compared = ("visual", "logit_")
        model_cfg = {**model_cfg, "text_cfg": _NO_TEXT}
        if moe_config is not None:
            moe_config = moe_config.replace(towers=("image",)) if "image" in (moe_config.towers or ()) else None
    with (
        model_directory.temporary({"model_cfg": model_cfg}) as name,
        torch.device("meta"),
        hub.expecting_random_weights(),
    ):
        described = open_clip.create_model(name, load_weights=False, device="meta", pretrained_text=False)
        resize_tower(described, model_cfg, dict(model.named_parameters()))
    if moe_config is not None:
        described = upcycle(described, moe_config, inplace=True)
    ours, theirs = _function(model, compared, sizes), _function(described, compared, sizes)
    return [
        f"{what} is {shown(ours.get(what))}, the config describes {shown(theirs.get(what))}"
        for what in {**ours, **theirs}
        if ours.get(what) != theirs.get(what)
    ]


def _function(model: nn.Module, compared: tuple[str, ...], sizes: bool) -> dict[str, Any]:
    """What the modules whose names begin with one of ``compared`` compute, as far as we know, in words."""
    function: dict[str, Any] = {}
    if sizes:
        shapes = {name: list(value.shape) for name, value in model.state_dict().items() if not name.endswith(_COUNTS)}
        function |= {f"the shape of {name}": shape for name, shape in shapes.items() if name.startswith(compared)}
    attributes = _ATTRIBUTES + _SIZES * sizes
    for name, module in model.named_modules():
        if name.startswith(compared):
            values: dict[str, Any] = {}
            if type(module).__module__ in _ACTIVATIONS or isinstance(module, QuickGELU):
                values["class"] = type(module).__name__
            values |= {what: _plain(vars(module)[what]) for what in attributes if what in vars(module)}
            if hasattr(module, "attn_mask"):
                values["causal mask"] = module.attn_mask is not None
            function |= {f"{what} of {name or 'the model'}": value for what, value in values.items()}
    return function


def resize_tower(model: nn.Module, model_cfg: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Sets an image tower of timm to the image size of its config, unless these weights fit it as it is. open_clip's
    factory does so only under ``force_image_size``, after it has loaded weights."""
    visual: Any = getattr(model, "visual", None)
    trunk = getattr(visual, "trunk", None)
    size = _timm_size(model_cfg)
    if size is None or not hasattr(trunk, "set_input_size") or not hasattr(visual, "set_input_size"):
        return
    positions, stored = getattr(trunk, "pos_embed", None), weights.get(_POSITIONS)
    fits = positions is not None and stored is not None and positions.shape == stored.shape
    original = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if not fits and original is not None and tuple(original) != size:
        visual.set_input_size(size)


def is_resized(model_cfg: dict[str, Any]) -> bool:
    """Whether a config has an image tower of timm at another image size than it is made for."""
    size = _timm_size(model_cfg)
    if size is None:
        return False
    original = timm.get_pretrained_cfg(model_cfg["vision_cfg"]["timm_model_name"], allow_unregistered=True)
    return original is not None and tuple(original.input_size[-2:]) != size


def _timm_size(model_cfg: dict[str, Any]) -> tuple[int, int] | None:
    size = model_cfg["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    if not model_cfg["vision_cfg"].get("timm_model_name"):
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])
