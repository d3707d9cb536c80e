"""Bounds for kernels in Triton's interpreter: every load and store has to stay within the launch's tensors.

The interpreter reads and writes the process's memory at the addresses that a kernel computes, so an access outside of a
tensor goes unnoticed if it hits something that belongs to the process.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class OutsideOfTensors(IndexError):
    """A kernel read or wrote memory of none of its arguments."""


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def guard(monkeypatch) -> None:
    """Checks every launch from now on."""
    functions, prepare = interpreter._interpreter, interpreter.GridExecutor._init_args_hst
    tensors: list[Tensor] = []

    def check(pointers, mask, size: int, what: str) -> None:
        mask = np.asarray(mask, bool)  # a memoryview where Triton 3.6 reads by a descriptor
        addresses = pointers[mask].astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        for tensor in tensors:
            start = tensor.data_ptr()
            inside |= (start <= addresses) & (addresses + size <= start + extent(tensor))
        if not inside.all():
            raise OutsideOfTensors(f"a {what} of {size} bytes is in none of the arguments")

    def load(pointers, mask, other, dtype):
        check(pointers, mask, np.dtype(dtype).itemsize, "load")
        return functions.load(pointers, mask, other, dtype)

    def store(pointers, values, mask):
        check(pointers, mask, values.dtype.itemsize, "store")
        return functions.store(pointers, values, mask)

    def with_bounds(self, arguments, keywords):
        ours, ours_by_name = prepare(self, arguments, keywords)
        values = [getattr(value, "base", value) for value in (*ours, *ours_by_name.values())]
        tensors[:] = [value for value in values if isinstance(value, Tensor)]
        return ours, ours_by_name

    guarded = SimpleNamespace(**vars(functions) | {"load": load, "store": store})
    monkeypatch.setattr(interpreter, "_interpreter", guarded)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", with_bounds)
