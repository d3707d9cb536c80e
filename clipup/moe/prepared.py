"""Sparse layers that hold packed weights in place of plain ones, for inference on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from clipup_kernels import Plan

from ..dense.prepared import MATRICES, Prepared, _Part, _Stored
from .experts import Experts, SharedExpert
from .layer import SparseMoE


class _PreparedExperts(Prepared, Experts):
    """Experts whose matrices are packed. Biases and norms are plain parameters that ask for no gradient."""

    def prepare(self) -> None:
        matrices = {name: parameter for name in MATRICES if (parameter := self._parameters.pop(name)) is not None}
        whole = {
            name: _Stored(m.shape, m.dtype, [_Part(name, m.shape, m.contiguous().stride(), 0)])
            for name, m in matrices.items()
        }
        self._prepare(matrices, whole)

    def run_experts(self, tokens: Tensor, gates: Tensor, plan: Plan, dtype: torch.dtype | None) -> Tensor:
        return super().run_experts(tokens if dtype is None else tokens.to(dtype), gates, plan, None)


class PreparedSharedExpert(_PreparedExperts, SharedExpert):
    """A shared expert in a ``PreparedMoE``."""


class PreparedMoE(_PreparedExperts, SparseMoE):
    """A ``SparseMoE`` for inference, with bitwise the same results."""

    def prepare(self) -> None:
        super().prepare()
        if self.shared is not None:
            self.shared.__class__ = PreparedSharedExpert
            self.shared.prepare()

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_type(x)
        super()._check(x, mask)
