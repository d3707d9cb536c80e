"""``accelerate_report``: which layers of a model are prepared, how exact they are, and why others are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from clipup_kernels.types import QUANTIZATIONS

from .. import checks
from .prepared import Prepared, quantization
from .selection import Selection

CAN_BE_PREPARED = "it can be prepared: clipup.accelerate(model)"
"""The reason for a layer that was put into the model after ``accelerate``, or excluded from it."""


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
    error: float | None = None
    """Root mean square of the errors of a product of the layer's weights in int8, relative to how its results vary
    between rows; of its products, the largest. None if the layer was not calibrated."""

    def __str__(self) -> str:
        error = ", not calibrated" if self.error is None else f", error {self.error:.2%}"
        shown = error if self.weights in QUANTIZATIONS else ""
        return f"{self.name or 'model'}: {self.layer}, {self.weights or f'left: {self.reason}'}{shown}"


def accelerate_report(model: nn.Module) -> list[LayerReport]:
    """What ``clipup.accelerate`` made of each layer of a model, and why it left others. Calibrated layers come first,
    by their errors, the largest first; then the others in the order of the modules.

    ``print(*clipup.accelerate_report(model), sep="\\n")`` shows it, and ``collections.Counter(row.weights for row in
    clipup.accelerate_report(model))`` counts the layers by the type of their weights, None for those that were left. It
    is read from the model as it is now, as ``clipup.moe_layers`` is: nothing is stored that a copy, a pickle or a layer
    replaced later could contradict, and ``accelerate`` returns the model alone. A layer that was excluded, or put in
    afterwards, is reported as a layer that can be prepared.

    Layers are experts, MLPs, attention, linear layers and convolutions. A module whose layers are left for one reason
    is one row. Embeddings, norms and parameters that a model multiplies itself (open_clip's ``text_projection``) are
    in no row.

    Raises:
        TypeError: ``model`` is not a module.
    """
    checks.module("model", model)
    rows = rows_of(Selection(model, quantization(model)))
    return sorted(rows, key=lambda row: -1.0 if row.error is None else row.error, reverse=True)


def rows_of(selection: Selection) -> Iterator[LayerReport]:
    """A row for every layer, in the order of the modules."""
    inside: tuple[str, ...] = ()
    for name, module in selection.model.named_modules():
        reason = CAN_BE_PREPARED if module in selection.chosen else selection.left.get(module)
        if isinstance(module, Prepared):
            weights = module.quantize or str(module.dtype).removeprefix("torch.")
            yield LayerReport(name, type(module).__name__, weights, error=module.error)
        elif reason and not name.startswith(inside):
            yield LayerReport(name, type(module).__name__, None, reason)
            inside = (*inside, f"{name}." if name else "")
