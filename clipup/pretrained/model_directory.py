"""Reads the config and weights of a model directory (the format is described in ``saving``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checks
from ..moe.config import MoEConfig
from .config_files import moe_config_in, read_config_file
from .shard_files import is_sharded
from .state_dicts import read_safetensors, safetensors_on_meta

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
"""Of files in which open_clip finds the weights of a directory."""
_NAME = re.compile(r"(hf-hub:)?\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")
"""A name of timm's or transformers', or of the hub: nothing that they would read as a path outside."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not valid JSON, its ``model_cfg`` is missing, incomplete or refers to files elsewhere,
            or the mean or std of images are not numbers.
    """
    path = Path(directory) / CONFIG_NAME
    if is_sharded(directory) and not path.is_file():
        raise FileNotFoundError(
            f"{directory} is a sharded checkpoint, not a model; make a model directory of it with clipup convert"
        )
    config = read_config_file(path, "a directory saved by clipup or open_clip")
    check_model_cfg(config.get("model_cfg"), path)
    check_preprocess_cfg(config.get("preprocess_cfg"), path)
    return config


def check_model_cfg(model_cfg: Any, path: Path) -> None:
    """Raises ``ValueError``, naming the file, for a ``model_cfg`` that is incomplete or refers to files elsewhere."""
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{path} has no model_cfg, the config of the model")
    missing = [field for field in MODEL_FIELDS if field not in model_cfg]
    if missing:
        raise ValueError(f"model_cfg in {path} lacks {', '.join(missing)}")
    for tower in ("vision_cfg", "text_cfg"):
        checks.check(f"{tower} in {path}", model_cfg[tower], isinstance(model_cfg[tower], dict), "an object")
    check_name(f"{path}: timm_model_name", model_cfg["vision_cfg"].get("timm_model_name"))
    for field in ("hf_model_name", "hf_tokenizer_name"):
        name = model_cfg["text_cfg"].get(field)
        checks.check(f"{path}: {field}", name, name is None or isinstance(name, str), "a name")


def check_name(field: str, name: Any) -> None:
    """Raises ``ValueError`` for a name in a config that would be read as a path. None and "" are no name."""
    if name is not None and name != "" and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"{field} must be a name, such as ORG/NAME, got {name!r}; a config must not refer to other files"
        )


def check_preprocess_cfg(preprocess_cfg: Any, path: Path) -> None:
    """Refuses, naming the file, what is no object, and a mean, standard deviation or fill color of the images' channels
    that is not a finite number."""
    if preprocess_cfg is None:
        return
    checks.check(f"preprocess_cfg in {path}", preprocess_cfg, isinstance(preprocess_cfg, dict), "an object")
    for field, check in ("mean", checks.number), ("std", checks.positive_number), ("fill_color", checks.number):
        value = preprocess_cfg.get(field)
        if value is None:
            continue
        name = f"{path}: {field}"
        of_channels = isinstance(value, list | tuple)  # checkpoints hold tuples
        if of_channels:
            checks.check(name, value, len(value) == 3, "one number, or one per channel")
        for one in value if of_channels else [value]:
            check(name, one)


def read_moe_config(directory: str | Path) -> MoEConfig | None:
    """The directory's ``moe_cfg``; None for a dense model."""
    return moe_config_in(read_config(directory), Path(directory) / CONFIG_NAME)


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The directory's state dict, on the CPU."""
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False creates the model without")
    return read_safetensors(path)


def check_weights(directory: str | Path) -> None:
    """Refuses a directory in which open_clip would find no weights: it would leave random ones.

    Raises:
        FileNotFoundError: there are none.
    """
    if not any(path.suffix in _WEIGHT_SUFFIXES for path in Path(directory).iterdir()):
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False creates the model without")


def weights_on_meta(directory: str | Path) -> dict[str, Tensor]:
    """The dtypes and shapes of the directory's tensors by name; empty if the weights are not safetensors."""
    path = Path(directory) / WEIGHTS_NAME
    return safetensors_on_meta(path) if path.is_file() else {}
