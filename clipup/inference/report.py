"""``accelerate_report``: what ``accelerate`` made of each layer of a model, and why it left others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .. import checks
from ..dense.dense_mlp import class_name
from .prepared import Prepared
from .prepared_attention import ATTENTION_MODULES
from .selection import Selection, select

PREPARABLE = "it can be prepared: clipup.accelerate(model)"
"""The reason about a layer that was not left, but not given to ``accelerate`` yet."""


@dataclass(frozen=True)
class LayerReport:
    """A layer with matrices: prepared, or left and why."""

    name: str
    """Full name of the module in the model; empty for the model itself. A shared module has its first name."""
    layer: str
    """Class of the module."""
    weights: str | None
    """Type of the packed weights, such as "int8" or "bfloat16"; None if the layer was left as it is."""
    reason: str | None = None
    """Why it was left; None if it is prepared."""

    def __str__(self) -> str:
        return f"{self.name or 'model'}: {self.layer}, {self.weights or f'left: {self.reason}'}"


def accelerate_report(model: nn.Module) -> list[LayerReport]:
    """What ``clipup.accelerate`` made of each layer of a model, and why it left others, in the order of the modules.

    ``print(*clipup.accelerate_report(model), sep="\\n")`` shows it. It is read from the model as it is now, as
    ``clipup.moe_layers`` is: nothing is stored that a copy, a pickle or a layer replaced later could contradict, and
    ``accelerate`` returns the model alone. A layer that was put in afterwards is reported as one that can be prepared.

    Layers are experts, MLPs, attention, linear layers and convolutions. A module whose layers are left for one reason
    is one row. Embeddings, norms and parameters that a model multiplies itself (open_clip's ``text_projection``) are
    in no row.

    Raises:
        TypeError: ``model`` is not a module.
    """
    checks.module("model", model)
    quantize = next((module.quantize for module in model.modules() if isinstance(module, Prepared)), None)
    return list(rows(model, select(model, quantize)))


def rows(model: nn.Module, selection: Selection) -> Iterator[LayerReport]:
    """The report about a model of which ``selection`` says what could be prepared."""
    modules = dict(model.named_modules())
    inside: tuple[str, ...] = ()
    for name, module in modules.items():
        if isinstance(module, Prepared):
            weights = module.quantize or str(module.dtype).removeprefix("torch.")
            yield LayerReport(name, type(module).__name__, weights)
        if isinstance(module, Prepared) or (inside and name.startswith(inside)):
            continue
        if module in selection.chosen:
            reason: str | None = PREPARABLE
        elif module in selection.left and any(map(_has_matrix, module.modules())):
            reason = selection.left[module]
        elif _has_matrix(module):
            place = class_name(modules[name.rpartition(".")[0]])
            reason = f"{place} is not a supported block, attention or patch embedding"
        else:
            continue
        yield LayerReport(name, type(module).__name__, None, reason)
        inside = (*inside, f"{name}." if name else "")


def _has_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) or class_name(module) in ATTENTION_MODULES
