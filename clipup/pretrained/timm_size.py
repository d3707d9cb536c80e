"""Image towers of timm at another image size than they are made for. open_clip's factory resizes them only under
``force_image_size``, after it has loaded weights; a config says the size all the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import timm
from torch import Tensor, nn

_POSITIONS = "visual.trunk.pos_embed"
_OF_SIZES = (_POSITIONS, "relative_position_bias_table", "rel_pos_h")
"""Ends of names of weights in towers that know the size of their images."""


def resize_tower(model: nn.Module, model_cfg: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Sets the tower to the image size of its config, unless these weights fit it as it is."""
    visual: Any = getattr(model, "visual", None)
    trunk = getattr(visual, "trunk", None)
    size = _size(model_cfg)
    if size is None or not hasattr(trunk, "set_input_size") or not hasattr(visual, "set_input_size"):
        return
    positions, found = getattr(trunk, "pos_embed", None), weights.get(_POSITIONS)
    if positions is not None and found is not None and positions.shape == found.shape:
        return
    made = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if made is not None and tuple(made) != size:
        visual.set_input_size(size)


def is_resized(model_cfg: dict[str, Any], names: Collection[str]) -> bool:
    """Whether weights with these names are, by their config, of a tower that was resized."""
    size = _size(model_cfg)
    if size is None or not any(name.endswith(_OF_SIZES) for name in names):
        return False
    made = timm.get_pretrained_cfg(model_cfg["vision_cfg"]["timm_model_name"], allow_unregistered=True)
    return made is not None and tuple(made.input_size[-2:]) != size


def _size(model_cfg: dict[str, Any]) -> tuple[int, int] | None:
    vision_cfg = model_cfg.get("vision_cfg") or {}
    size = vision_cfg.get("image_size", 224)
    if not vision_cfg.get("timm_model_name"):
        return None
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None
