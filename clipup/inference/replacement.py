"""Puts prepared layers into the places of plain ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from clipup_kernels.types import Quantization

from ..progress import progress
from .prepared import Prepared, refuse_to_load


def replace_layers(
    model: nn.Module,
    chosen: dict[nn.Module, type[Prepared]],
    weights: Quantization | None,
    sources: dict[nn.Module, Any],
) -> nn.Module:
    """Puts prepared layers into a model, and makes it refuse to train or to load.

    Args:
        chosen: ``Selection.chosen``. Emptied, as ``sources`` is.
        sources: ``Calibration`` or ``Stored`` tensors of the plain layers.

    Returns:
        The model, or the layer that replaces it.
    """
    for _ in progress(range(len(chosen)), "packing", "layers"):
        plain, kind = chosen.popitem()  # its memory is free before the next one is packed
        layer = kind.of(plain, weights, sources.pop(plain, None))
        for parent in replace_module(model, plain, layer):
            layer.placed(parent)
        model = layer if plain is model else model
    for module in model.modules():
        if any(isinstance(part, Prepared) for part in module.modules()):
            module.register_load_state_dict_pre_hook(refuse_to_load)
    model.requires_grad_(False)
    model.eval()
    return model


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> list[nn.Module]:
    """Puts a module wherever another one is in a model, and returns the modules that have it now."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        parent.add_module(name, new)
    return [parent for parent, _ in places]
