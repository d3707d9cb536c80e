"""The config and weights of a model directory (the format is described in ``saving``)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import checks
from ..moe.config import MoEConfig
from .known_models import LOCAL_PREFIX

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
INT8 = "quantization_config"
"""Key of ``int8_config`` in the config of a model in int8 (``clipup.inference.int8_tensors``)."""
_MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg")


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not valid JSON, or its ``model_cfg`` is incomplete.
    """
    path = Path(directory) / CONFIG_NAME
    config = read_config_file(path, "a directory saved by clipup or open_clip")
    check_model_cfg(config.get("model_cfg"), str(path))
    return config


def read_config_file(path: Path, expected: str) -> dict[str, Any]:
    """The object in a config file.

    Args:
        expected: what an error says was expected instead of a directory without this file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not valid JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected {expected}{of_transformers(path.parent)}")
    return checks.read_json(path)


def of_transformers(directory: Path) -> str:
    """What to do with a model of transformers in a directory, for the end of a message; empty if there is none."""
    if not (directory / "config.json").is_file() or "model_type" not in checks.read_json(directory / "config.json"):
        return ""
    return (
        "; it holds a model of transformers, for Python: import clipup, model = "
        f"transformers.AutoModel.from_pretrained({str(directory)!r}), then clipup.upcycle(model) or "
        "clipup.accelerate(model), and model.get_image_features"
    )


def check_model_cfg(model_cfg: Mapping[str, Any] | None, source: str) -> None:
    """Raises ``ValueError``, naming the source, for a ``model_cfg`` that is incomplete."""
    if missing := [field for field in _MODEL_FIELDS if field not in (model_cfg or {})]:
        raise ValueError(f"{source}: model_cfg lacks {', '.join(missing)}; expected that of clipup.get_model_config")


def moe_config_in(config: dict[str, Any]) -> MoEConfig | None:
    """The ``moe_cfg`` of a config file; None for a dense model.

    Raises:
        TypeError, ValueError: of ``MoEConfig``.
    """
    values = config.get("moe_cfg")
    return None if values is None else MoEConfig.from_dict(values)


@contextmanager
def temporary(config: dict[str, Any]) -> Iterator[str]:
    """The name of a directory with this config, which exists in this context."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        yield f"{LOCAL_PREFIX}{directory}"
