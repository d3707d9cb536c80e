"""What the tests on a GPU share: when they run, tensors moved there, memory that shows unwritten outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_map_only

NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]


def on_gpu(value):
    """A tensor, or the tensors of a tuple, on the current GPU."""
    return tree_map_only(torch.Tensor, torch.Tensor.cuda, value)


def poison_memory() -> None:
    """Memory that the caching allocator hands out next holds NaN, so that an output not written whole shows."""
    sizes = 64 * [1 << 8, 1 << 12, 1 << 16] + [1 << 20, 1 << 24]  # up to 1 MiB from a pool of their own
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    del blocks


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
