"""``model_cfg``: what open_clip's factory makes of it under its arguments, and how one config differs from another."""

from __future__ import annotations

import dataclasses
from typing import Any

from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

_TOWERS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_FORCED_FIELDS = {
    "force_image_size": ("vision_cfg", "image_size"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_context_length": ("text_cfg", "context_length"),
}
_FORCED_FLAGS = {"force_quick_gelu": "quick_gelu", "force_custom_text": "custom_text"}
_NOT_COMPARED = {
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),  # the weights say it
    *("custom_text", "output_dict", "cast_dtype"),  # the same function
    *("patch_dropout", "timm_drop", "timm_drop_path"),  # in training only
    *("timm_model_pretrained", "hf_model_pretrained"),  # where weights that are replaced come from
}
_ABSENT: tuple[Any, ...] = (None, False, "", {})


def overridden(model_cfg: dict[str, Any], forced: dict[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of the model that open_clip's factory makes of this one under its ``force_*`` arguments."""
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


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields, such as "vision_cfg.head_width", in which two configs give models that compute something else, with
    both values. What is not said has open_clip's default; what the weights say is not compared."""
    first, second = _fields(one), _fields(other)
    return {
        field: (first.get(field), second.get(field))
        for field in sorted(first.keys() | second.keys())
        if _plain(field, first.get(field)) != _plain(field, second.get(field))
    }


def _fields(model_cfg: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in model_cfg.items() if name not in _NOT_COMPARED | _TOWERS.keys()}
    for tower, options in _TOWERS.items():
        if model_cfg.get(tower) is not None:
            values = {field.name: field.default for field in dataclasses.fields(options)} | model_cfg[tower]
            found |= {f"{tower}.{name}": value for name, value in values.items() if name not in _NOT_COMPARED}
    return found


def _plain(field: str, value: Any) -> Any:
    """A value as JSON would give it, in one of the forms that mean the same."""
    if isinstance(value, list | tuple):
        value = list(value)
        return value[0] if field.endswith("image_size") and value == value[:1] * 2 else value
    return None if value in _ABSENT else value
