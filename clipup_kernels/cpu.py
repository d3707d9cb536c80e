"""What answers an op on CPU tensors: C++ (``native``), matmul per expert (``matmul``) or plain torch (``generic``)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import generic, info, matmul, native

_PRODUCTS = ("grouped_linear", "grouped_linear_backward", "expert_mlp_forward", "expert_mlp_backward", "dense_mlp")


def backend(name: str, dtype: torch.dtype) -> ModuleType:
    """The module that computes op ``name`` for tensors of ``dtype``.

    Plain torch without the extension and in float64. Matmul where torch has what the micro-kernels lack: matrix tiles
    for bfloat16 (AMX), any vector instructions at all on a CPU that only the portable kernels know.
    """
    if info.NATIVE is None or dtype == torch.float64:
        return generic
    if name in _PRODUCTS and dtype in info.matmul_dtypes():
        return matmul
    return native


def _op(name: str) -> Callable:
    def chosen(first: Tensor, *args):
        return getattr(backend(name, first.dtype), name)(first, *args)

    chosen.__name__ = name
    return chosen


router_logits = _op("router_logits")
router_logits_backward = _op("router_logits_backward")
topk_gating = _op("topk_gating")
topk_gating_backward = _op("topk_gating_backward")
permute = _op("permute")
gather_sum = _op("gather_sum")
combine = _op("combine")
combine_backward = _op("combine_backward")
grouped_linear = _op("grouped_linear")
grouped_linear_backward = _op("grouped_linear_backward")
expert_mlp_forward = _op("expert_mlp_forward")
expert_mlp_backward = _op("expert_mlp_backward")
dense_mlp = _op("dense_mlp")


def dispatch(experts, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    if info.NATIVE is None:
        wrong = experts[(experts < -1) | (experts >= num_experts)]
        if len(wrong):
            raise ValueError(f"experts: expected values from -1 to {num_experts - 1}, got {int(wrong[0])}")
    return backend("dispatch", experts.dtype).dispatch(experts, num_experts, capacity_factor, priority, mask)
