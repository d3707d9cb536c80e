"""The tests of this folder hand CPU tensors to the functions that launch Triton's kernels."""

import os

import memory_guard
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Every load and store of a kernel stays within its arguments."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles kernels for its GPU; TRITON_INTERPRET=1 pytest -m interpreter")
    memory_guard.guard(monkeypatch)


@pytest.fixture
def poisoned_memory():
    """New tensors hold NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
