"""Dense MLPs of two modules, BERT's ``intermediate`` and ``output``, with packed weights, for inference on CPUs.

``PreparedIntermediate`` replaces the first module and computes the whole MLP in one op. The second module also adds the
residual and normalizes, so it stays, but its projection becomes a ``PreparedOutputProjection``, which only holds the
weights and returns its input. So all weights keep their places in the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..dense.dense_mlp import read_activation
from .calibration import Calibration
from .prepared import Prepared, PreparedMLP, Stored
from .prepared_linear import PreparedLinear


class PreparedOutputProjection(PreparedLinear):
    """The second projection of an MLP that a ``PreparedIntermediate`` computes."""

    centred = ("in_weight",)

    def forward(self, x: Tensor) -> Tensor:
        """x: the output of that layer."""
        return x


class PreparedIntermediate(PreparedMLP):
    """The first projection of an MLP and its activation; ``forward`` computes the second projection too."""

    out_weight = property(lambda self: self._output[0].dense.weight)
    out_bias = property(lambda self: self._output[0].dense.bias)

    def __init__(
        self, intermediate: Any, quantize: str | None = None, source: Calibration | Stored | None = None
    ) -> None:
        Prepared.__init__(self, intermediate, quantize, source)  # PreparedMLP's reads an MLP of one module
        self.activation, self.input_norm_name = read_activation(intermediate.intermediate_act_fn), None

    @staticmethod
    def read(plain: Any) -> Mapping[str, Tensor | None]:
        return PreparedLinear.read(plain.dense)

    seen = staticmethod(Prepared.seen)

    def placed(self, parent: Any) -> None:
        self._output = (parent.output,)  # in a tuple, so that it is not registered as a submodule
