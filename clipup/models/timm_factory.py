"""Creates timm models, dense or sparse, from a directory or the Hugging Face hub. The format is timm's, with an
additional key ``moe_cfg``:

    DIR/config.json         timm's architecture, model_args, pretrained_cfg, ...; and moe_cfg
    DIR/model.safetensors   the state dict

timm itself can load a dense model from it ("local-dir:DIR"); it refuses the weights of a sparse model.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.models import _hub
from torch import nn

from ..upcycling.upcycle import upcycle
from .hub import HUB_PREFIX, cached, naming_what_is_missing
from .known_models import LOCAL_PREFIX
from .model_directory import moe_config_in, read_config_file
from .state_dicts import assign_weights, check_tensors, drop_parameters, read_safetensors, without_random_numbers

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def create_timm_model(name: str, load_weights: bool = True, cache_dir: str | None = None, **kwargs: Any) -> nn.Module:
    """Loads a dense or sparse timm model saved by ``clipup.save_pretrained``.

    The model is in evaluation mode: call ``model.train()`` before training it.

    Args:
        name: a directory ("DIR" or "local-dir:DIR"), or "hf-hub:ORG/NAME".
        kwargs: passed to ``timm.create_model``, override the saved arguments.

    Raises:
        FileNotFoundError: config or weights are missing.
        ValueError: the weights do not fit the model.
    """
    if name.startswith(HUB_PREFIX):
        with naming_what_is_missing(name, cache_dir):
            directory = cached(name, CONFIG_NAME, *[WEIGHTS_NAME] * load_weights, cache_dir=cache_dir)
    else:
        directory = Path(name.removeprefix(LOCAL_PREFIX))
    moe_config = moe_config_in(read_config_file(directory / CONFIG_NAME, "a directory with a saved timm model"))
    weights = read_safetensors(directory / WEIGHTS_NAME) if load_weights else {}
    with without_random_numbers() if load_weights else nullcontext():
        model = timm.create_model(f"{LOCAL_PREFIX}{directory}", pretrained=False, **kwargs)
    device = next(model.parameters()).device
    if load_weights:
        drop_parameters(model)
    if moe_config is not None:
        upcycle(model, moe_config, inplace=True)
    if load_weights:
        check_tensors(model.state_dict(), weights, str(directory))
        assign_weights(model, weights, device)
    return model.eval()


def config_of(model: nn.Module, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """timm's config of a model.

    Args:
        model_args: arguments that the model was created with, in addition to those that timm recorded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, CONFIG_NAME)
        _hub.save_config_for_hf(model, path, model_args=model_args)  # type: ignore[arg-type]  # timm passes a Path too
        return json.loads(path.read_text(encoding="utf-8"))
