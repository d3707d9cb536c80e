"""Reads the config and weights of a model directory (the format is described in ``saving``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe.config import MoEConfig
from .config_files import moe_config_in, read_config_file
from .state_dicts import read_safetensors, types_in_safetensors

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg")


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not valid JSON, or its ``model_cfg`` is missing or incomplete.
    """
    path = Path(directory) / CONFIG_NAME
    config = read_config_file(path, "a directory saved by clipup or open_clip")
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{path} has no model_cfg, the config of the model")
    missing = [field for field in MODEL_FIELDS if field not in model_cfg]
    if missing:
        raise ValueError(f"model_cfg in {path} lacks {', '.join(missing)}")
    return config


def read_moe_config(directory: str | Path) -> MoEConfig | None:
    """The directory's ``moe_cfg``; None for a dense model."""
    return moe_config_in(read_config(directory), Path(directory) / CONFIG_NAME)


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The directory's state dict, on the CPU."""
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False creates the model without")
    return read_safetensors(path)


def types_of_weights(directory: str | Path) -> dict[str, torch.dtype]:
    """The dtypes of the directory's tensors by name; empty if the weights are not safetensors."""
    path = Path(directory) / WEIGHTS_NAME
    return types_in_safetensors(path) if path.is_file() else {}
