"""Contexts in which a model is evaluated; its state is restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
    configs = {layer: layer.config for layer in moe_layers(model).values()}
    for layer, config in configs.items():
        if not config.experts_choose:  # whose factor is no limit: it says how many tokens an expert takes
            layer.config = config.replace(eval_capacity_factor=None)
    try:
        with evaluating(model):
            yield
    finally:
        for layer, config in configs.items():
            layer.config = config
