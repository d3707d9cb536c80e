"""Bounds for kernels in Triton's interpreter: every load and store has to stay within the launch's tensors.

The interpreter reads and writes the process's memory at the addresses that a kernel computes, so an access outside of a
tensor goes unnoticed if it hits something that belongs to the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class OutsideOfTensors(IndexError):
    """A kernel read or wrote memory of none of its arguments."""


class _Guarded:
    """The interpreter's memory functions behind a check of the addresses."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        self.starts = self.ends = np.empty(0, np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def allow(self, tensors: list[Tensor]) -> None:
        """Only the memory of these tensors."""
        ranges: list[list[int]] = []
        for start, end in sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel()):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], end)
            else:
                ranges.append([start, end])
        self.starts, self.ends = (np.array(column, np.uint64) for column in zip(*ranges, strict=True) or ((), ()))

    def load(self, pointers, mask, other, dtype):
        self._check(pointers, mask, np.dtype(dtype).itemsize, "load")
        return self.functions.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._check(pointers, mask, values.dtype.itemsize, "store")
        return self.functions.store(pointers, values, mask)

    def _check(self, pointers, mask, size: int, what: str) -> None:
        mask = np.asarray(mask, bool)  # a memoryview where Triton 3.6 reads by a descriptor
        addresses = pointers[mask].astype(np.uint64)
        if addresses.size == 0:
            return
        place = np.searchsorted(self.starts, addresses, "right")
        inside = place > 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.ends[place[inside] - 1]
        if not inside.all():
            address = int(addresses[~inside][0])
            nearest = min((abs(address - int(edge)) for edge in (*self.starts, *self.ends)), default=0)
            raise OutsideOfTensors(f"a {what} of {size} bytes, {nearest} bytes from the nearest end of an argument")


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def guard(monkeypatch) -> None:
    """Checks every launch from now on."""
    guarded = _Guarded(interpreter._interpreter)
    prepare = interpreter.GridExecutor._init_args_hst

    def with_bounds(self, arguments, keywords):
        ours, ours_by_name = prepare(self, arguments, keywords)
        values = [getattr(value, "base", value) for value in (*ours, *ours_by_name.values())]
        guarded.allow([value for value in values if isinstance(value, Tensor)])
        return ours, ours_by_name

    monkeypatch.setattr(interpreter, "_interpreter", guarded)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", with_bounds)
