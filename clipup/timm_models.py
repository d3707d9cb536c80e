"""Directories of timm models, dense or sparse: timm's hub format with ``moe_cfg`` beside its own keys.

    DIR/config.json         timm's: architecture, model_args, pretrained_cfg, ...; and moe_cfg
    DIR/model.safetensors   the state dict

timm itself loads a dense one ("local-dir:DIR"); of a sparse one it refuses the weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import _hub
from torch import nn

from . import checkpoint
from .config import MoEConfig
from .hub import HUB_PREFIX, cache_alone_if_unreachable, cached
from .models import LOCAL_PREFIX
from .upcycle import upcycle
from .weights import read_safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def create_timm_model(name: str, load_weights: bool = True, cache_dir: str | None = None, **kwargs: Any) -> nn.Module:
    """A timm model that ``clipup.save_pretrained`` wrote, sparse where it was, in evaluation mode: call
    ``model.train()`` before training it.

    Args:
        name: a directory ("DIR" or "local-dir:DIR"), or "hf-hub:ORG/NAME".
        kwargs: as in ``timm.create_model``, in place of the arguments that were saved.

    Raises:
        FileNotFoundError: no config or weights there.
        ValueError: weights that do not fit the model.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, also where it is a directory, got {type(name).__name__}")
    if name.startswith(HUB_PREFIX):
        with cache_alone_if_unreachable(name, cache_dir):
            directory = cached(name, CONFIG_NAME, *[WEIGHTS_NAME] * load_weights, cache_dir=cache_dir)
    else:
        directory = Path(name.removeprefix(LOCAL_PREFIX))
    moe_config = read_moe_config(directory)
    model = timm.create_model(f"{LOCAL_PREFIX}{directory}", pretrained=False, **kwargs)
    if moe_config is not None:
        upcycle(model, moe_config, inplace=True)
    if load_weights:
        path = directory / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False builds the model without")
        weights = read_safetensors(path)
        checkpoint.check_fit(model, weights, str(directory), described_by=f"its {CONFIG_NAME}")
        model.load_state_dict(weights)
    return model.eval()


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
