"""Sparse layers that hold packed weights instead of plain ones, for inference on CPUs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from clipup_kernels.ops.sparse_mlp import is_one_op, packed_sparse_mlp

from ..dense.prepared import MATRICES, Prepared, pack_matrices, whole
from .experts import Experts, SharedExpert
from .layer import SHARED_GATE, SparseMoE
from .layer_state import LastRouting
from .router import Router

_METHODS = frozenset(
    name for name in dir(SparseMoE) if not name.startswith("__") and callable(getattr(SparseMoE, name))
)


class _PreparedExperts(Prepared, Experts):
    """Experts whose matrices are packed. Biases and norms are plain parameters that do not require gradients."""

    _order: list[str]
    """The parameters of the plain layer."""

    @classmethod
    def prepare(cls, experts: Experts, quantize: str | None = None) -> None:
        """Makes plain experts a layer of this class; if they cannot be packed, they stay as they are."""
        matrices = {name: weight for name in MATRICES if (weight := experts._parameters[name]) is not None}
        packed = pack_matrices(matrices, quantize)
        experts.__class__ = cls
        prepared = cast(_PreparedExperts, experts)
        prepared._order = list(prepared._parameters)
        for name in MATRICES:
            del prepared._parameters[name]
        prepared._stored = {name: whole(name, matrix) for name, matrix in matrices.items()}
        prepared._packed, prepared.quantize = {}, quantize
        prepared._keep(packed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in [prefix + name for name in (*self._order, *self._buffers)]:  # the plain layer's order
            if key in destination:
                destination[key] = destination.pop(key)

    def expert_group(self) -> None:
        """Prepared experts are all in this process."""

    def operands(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return super().operands(None)  # packed weights keep the type in which they were prepared


class PreparedSharedExpert(_PreparedExperts, SharedExpert):
    """A shared expert in a ``PreparedMoE``."""


class PreparedMoE(_PreparedExperts, SparseMoE):
    """A ``SparseMoE`` for inference, with bitwise identical results unless it is quantized."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, return_routing: bool = False) -> Any:
        """``SparseMoE.forward``, as one op where nobody looks at its parts."""
        if return_routing:
            return super().forward(x, mask, return_routing=True)
        how = self._in_one_op(x)
        if how is None:
            return super().forward(x, mask)
        self._check(x, mask)
        tokens = x.reshape(-1, self.d_model)
        token_mask = None if mask is None else mask.reshape(-1).bool()
        y, routing = packed_sparse_mlp(tokens, **how, mask=token_mask)
        if self.shared is not None:
            y = y + self.shared(tokens, token_mask, None, SHARED_GATE)
        self.state.keep_inference(lambda: LastRouting.of(*routing.unpack(), token_mask))
        return y.view_as(x)  # view(x.shape) takes three times as long

    def _in_one_op(self, x: Tensor) -> dict[str, Any] | None:
        """The arguments of ``packed_sparse_mlp``; None if the parts have to run one by one."""
        router, packed = self.router, self.in_weight
        if torch.compiler.is_compiling() or type(router) is not Router or not self.is_fused():
            return None
        if not _METHODS.isdisjoint(self.__dict__):  # one was assigned to this layer
            return None
        if not is_one_op(packed) or not isinstance(x, Tensor) or x.dtype != packed.dtype:
            return None
        how = router.in_one_op()
        if how is None:
            return None
        parameters = self._parameters
        return {
            **how,
            "in_weight": packed,
            "in_bias": parameters["in_bias"],
            "out_weight": self.out_weight,
            "out_bias": parameters["out_bias"],
            "activation": self.activation,
            "gate_weight": self.gate_weight,
            "gate_bias": parameters["gate_bias"],
            "gate_scale": self.gate_scale(),
        }

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        self._check_type(x)
        super()._check(x, mask)
