"""Directories of timm models: timm's hub format with ``moe_cfg`` beside its own keys."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from timm.models import _hub
from torch import nn

from ..moe.config import MoEConfig

CONFIG_NAME = "config.json"


WEIGHTS_NAME = "model.safetensors"


def read_moe_config(directory: Path) -> MoEConfig | None:
    """The directory's ``moe_cfg``, None for a dense model.

    Raises:
        FileNotFoundError, ValueError: no config, or one that is not timm's.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {directory}; expected a directory with a saved timm model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{path} names no architecture, so it is no config of a timm model")
    return None if config.get("moe_cfg") is None else MoEConfig.from_dict(config["moe_cfg"])


def config_of(model: nn.Module, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """timm's config of a model.

    Args:
        model_args: arguments that it was created with, in addition to those that timm recorded.

    Raises:
        ValueError: the model does not know its architecture's name.
    """
    if not getattr(model, "pretrained_cfg", None) or not model.pretrained_cfg.get("architecture"):
        raise ValueError(
            f"model is a {type(model).__name__} without the name of its architecture, so it could not be built again; "
            "make it with timm.create_model"
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, CONFIG_NAME)
        _hub.save_config_for_hf(model, path, model_args=model_args)
        return json.loads(path.read_text(encoding="utf-8"))
