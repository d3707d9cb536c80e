"""Contexts in which a model is evaluated; its state is restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import MoEConfig
from .layer import moe_layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode of every module is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating_dropless(model: nn.Module) -> Iterator[None]:
    """``evaluating`` with unlimited expert capacity; the layers' configs are restored afterwards."""

    def dropless(config: MoEConfig) -> dict[str, Any]:
        """Expert choice has no limit: its factor says how many tokens an expert takes."""
        return {} if config.experts_choose else {"eval_capacity_factor": None}

    with configs_changed(model, dropless), evaluating(model):
        yield


@contextmanager
def configs_changed(model: nn.Module, changes: Callable[[MoEConfig], dict[str, Any]]) -> Iterator[None]:
    """Inside, the configs of sparse layers have these changes."""
    configs = {layer: layer.config for layer in moe_layers(model).values()}
    try:
        for layer, config in configs.items():
            layer.config = config.replace(**changes(config))
        yield
    finally:
        for layer, config in configs.items():
            layer.config = config
