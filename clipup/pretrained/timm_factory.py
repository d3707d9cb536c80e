"""Directories of timm models, dense or sparse: timm's hub format with ``moe_cfg`` beside its own keys.

    DIR/config.json         timm's: architecture, model_args, pretrained_cfg, ...; and moe_cfg
    DIR/model.safetensors   the state dict

timm itself loads a dense one ("local-dir:DIR"); of a sparse one it refuses the weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..upcycling.upcycle import upcycle
from .hub import HUB_PREFIX, cache_alone_if_unreachable, cached
from .model_names import LOCAL_PREFIX
from .state_dicts import check_fit, read_safetensors
from .structure import assign_weights, drop_parameters, without_random_numbers
from .timm_directory import CONFIG_NAME, WEIGHTS_NAME, read_moe_config


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
    path = directory / WEIGHTS_NAME
    if load_weights and not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False builds the model without")
    with without_random_numbers() if load_weights else nullcontext():
        model = timm.create_model(f"{LOCAL_PREFIX}{directory}", pretrained=False, **kwargs)
    device = next(model.parameters()).device
    if load_weights:
        drop_parameters(model)
    if moe_config is not None:
        upcycle(model, moe_config, inplace=True)
    if load_weights:
        weights = read_safetensors(path)
        check_fit(model, weights, str(directory), described_by=f"its {CONFIG_NAME}")
        assign_weights(model, weights, device)
    return model.eval()
