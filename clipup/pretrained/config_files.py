"""JSON config files of model directories, and the ``moe_cfg`` in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import checks
from ..moe.config import MoEConfig


def read_config_file(path: Path, saved_by: str) -> dict[str, Any]:
    """The object in a config file.

    Args:
        saved_by: what an error says was expected instead of a directory without this file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not valid JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected {saved_by}")
    config = checks.read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object with the config of a model")
    return config


def moe_config_in(config: dict[str, Any], path: Path) -> MoEConfig | None:
    """The ``moe_cfg`` of a config file; None for a dense model.

    Raises:
        TypeError, ValueError: of ``MoEConfig``, naming the file.
    """
    values = config.get("moe_cfg")
    if values is None:
        return None
    try:
        return MoEConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def check_depth(model_cfg: Any, tensors: int, source: Path | str) -> None:
    """Refuses towers of more layers than a file has tensors, before memory is taken for them.

    Args:
        tensors: how many the file of weights has.

    Raises:
        ValueError: a tower has more layers.
    """
    for tower in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        part = model_cfg.get(tower) if isinstance(model_cfg, dict) else None
        layers = part.get("layers") if isinstance(part, dict) else None
        if isinstance(layers, list):  # of a ResNet's stages
            layers = sum(count for count in layers if isinstance(count, int))
        if isinstance(layers, int) and layers > max(tensors, 1):
            raise ValueError(
                f"{source}: {tower} has {layers} layers, but there are {tensors} tensors of weights; config and "
                "weights do not belong together"
            )
