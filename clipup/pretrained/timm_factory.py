"""Creates timm models, dense or sparse, from a directory or the Hugging Face hub (format: ``timm_directory``)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..upcycling.upcycle import upcycle
from .hub import HUB_PREFIX, cached, offline_if_unreachable
from .model_names import LOCAL_PREFIX
from .state_dicts import check_fit, read_safetensors
from .structure import assign_weights, drop_parameters, without_random_numbers
from .timm_directory import CONFIG_NAME, WEIGHTS_NAME, read_moe_config


def create_timm_model(name: str, load_weights: bool = True, cache_dir: str | None = None, **kwargs: Any) -> nn.Module:
    """Loads a dense or sparse timm model saved by ``clipup.save_pretrained``.

    The model is in evaluation mode: call ``model.train()`` before training it.

    Args:
        name: a directory ("DIR" or "local-dir:DIR"), or "hf-hub:ORG/NAME".
        kwargs: passed to ``timm.create_model``, override the saved arguments.

    Raises:
        FileNotFoundError: config or weights are missing.
        ValueError: timm cannot create the model, or the weights do not fit it.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, also for a directory, got {type(name).__name__}")
    if name.startswith(HUB_PREFIX):
        with offline_if_unreachable(name, cache_dir):
            directory = cached(name, CONFIG_NAME, *[WEIGHTS_NAME] * load_weights, cache_dir=cache_dir)
    else:
        directory = Path(name.removeprefix(LOCAL_PREFIX))
    moe_config = read_moe_config(directory)
    path = directory / WEIGHTS_NAME
    if load_weights and not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {directory}; load_weights=False creates the model without")
    with without_random_numbers() if load_weights else nullcontext():
        try:
            model = timm.create_model(f"{LOCAL_PREFIX}{directory}", pretrained=False, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # timm has no common class for what a wrong config raises
            raise ValueError(
                f"timm could not create the model of {directory / CONFIG_NAME}: {type(error).__name__}: {error}"
            ) from error
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
