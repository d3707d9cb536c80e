"""What answers an op on CPU tensors: C++ (``native``), matmul per expert (``matmul``) or plain torch (``generic``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from ..types import PLAIN_LAYOUT
from . import cpp, extension, torch_eager, torch_matmul

_PRODUCTS = ("grouped_linear", "grouped_linear_backward", "expert_mlp_forward", "expert_mlp_backward", "dense_mlp")
_PACKED = ("packed_grouped_linear", "packed_expert_mlp", "packed_dense_mlp")


def backend(name: str, dtype: torch.dtype) -> ModuleType:
    """The module that computes op ``name`` for tensors of ``dtype``.

    Plain torch without the extension and in float64. Matmul where torch has what the micro-kernels lack: matrix tiles
    for bfloat16 (AMX), any vector instructions at all on a CPU that only the portable kernels know.
    """
    if extension.NATIVE is None or dtype == torch.float64:
        return torch_eager
    if name in _PRODUCTS and dtype in extension.matmul_dtypes():
        return torch_matmul
    return cpp


@functools.cache
def packed_layout(dtype: torch.dtype) -> str:
    """How ``pack_weight`` orders weights of ``dtype`` here (``PackedWeight.layout``)."""
    if backend("expert_mlp_forward", dtype) is not cpp:
        return PLAIN_LAYOUT
    panel, per_word = extension.NATIVE.packed_layout(cpp.DTYPE_CODE[dtype])
    return f"{'float32' if per_word == 1 else 'bfloat16x2'}x{panel}"


def kernel_of(name: str) -> Callable:
    """The function that computes op ``name``: it asks for the backend at every call."""
    if name == "dispatch":
        return _dispatch

    if name in _PACKED:
        return _on_packed_weights(name)

    def chosen(first: Tensor, *args):
        return getattr(backend(name, first.dtype), name)(first, *args)

    return chosen


def _dispatch(experts, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    if extension.NATIVE is None:
        wrong = experts[(experts < -1) | (experts >= num_experts)]
        if len(wrong):
            raise ValueError(f"experts: expected values from -1 to {num_experts - 1}, got {int(wrong[0])}")
    return backend("dispatch", experts.dtype).dispatch(experts, num_experts, capacity_factor, priority, mask)


def _on_packed_weights(name: str) -> Callable:
    """The layout is an argument because an exported program may run on another machine than it was made on."""

    def checked(first: Tensor, *args):
        *others, layout = args
        checks.layout(layout, packed_layout(first.dtype))
        return getattr(cpp, name)(first, *others)

    return checked
