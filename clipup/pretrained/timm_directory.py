"""Configs of timm model directories: timm's hub format with an additional key ``moe_cfg``.

    DIR/config.json         timm's architecture, model_args, pretrained_cfg, ...; and moe_cfg
    DIR/model.safetensors   the state dict

timm itself can load a dense model from it ("local-dir:DIR"); it refuses the weights of a sparse one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from timm.models import _hub
from torch import nn

from ..moe.config import MoEConfig
from .config_files import moe_config_in, read_config_file
from .model_directory import check_name

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def read_moe_config(directory: Path) -> MoEConfig | None:
    """The directory's ``moe_cfg``; None for a dense model.

    Raises:
        FileNotFoundError: the directory has no config.
        ValueError: it is not a timm config.
    """
    path = directory / CONFIG_NAME
    config = read_config_file(path, "a directory with a saved timm model")
    if "architecture" not in config:
        raise ValueError(f"{path} has no architecture, so it is not the config of a timm model")
    check_name(f"{path}: architecture", config["architecture"])
    return moe_config_in(config, path)


def config_of(model: nn.Module, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """timm's config of a model.

    Args:
        model_args: arguments that the model was created with, in addition to those that timm recorded.

    Raises:
        ValueError: the model has no architecture name.
    """
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        raise ValueError(
            f"model is a {type(model).__name__} without an architecture name, so it could not be loaded again; "
            "create it with timm.create_model"
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, CONFIG_NAME)
        _hub.save_config_for_hf(model, path, model_args=model_args)  # type: ignore[arg-type]  # timm passes a Path too
        return json.loads(path.read_text(encoding="utf-8"))
