"""Sparse layers that hold packed weights instead of plain ones, for inference on CPUs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..dense.prepared import MATRICES, Part, Prepared, Stored
from .experts import Experts, SharedExpert
from .layer import SparseMoE


class _PreparedExperts(Prepared, Experts):
    """Experts whose matrices are packed. Biases and norms are plain parameters that do not require gradients."""

    def prepare(self, quantize: str | None = None) -> None:
        matrices = {name: parameter for name in MATRICES if (parameter := self._parameters.pop(name)) is not None}
        whole = {
            name: Stored(m.shape, m.dtype, [Part(name, m.shape, m.contiguous().stride(), 0)])
            for name, m in matrices.items()
        }
        self._prepare(matrices, whole, quantize)

    def expert_group(self) -> None:
        """Prepared experts are all in this process."""

    def operands(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return super().operands(None)  # packed weights keep the type in which they were prepared


class PreparedSharedExpert(_PreparedExperts, SharedExpert):
    """A shared expert in a ``PreparedMoE``."""


class PreparedMoE(_PreparedExperts, SparseMoE):
    """A ``SparseMoE`` for inference, with bitwise identical results unless it is quantized."""

    def prepare(self, quantize: str | None = None) -> None:
        super().prepare(quantize)
        if self.shared is not None:
            self.shared.__class__ = PreparedSharedExpert
            cast(PreparedSharedExpert, self.shared).prepare(quantize)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_type(x)
        super()._check(x, mask)
