"""The tests of this folder hand CPU tensors to the functions that launch Triton's kernels."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:  # some platforms have no wheel of it
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Every load and store of a kernel stays within its arguments."""
    import memory_guard

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles kernels for its GPU; TRITON_INTERPRET=1 pytest -m interpreter")
    memory_guard.guard(monkeypatch)


@pytest.fixture
def on_triton(monkeypatch):
    """Chooses for CPU tensors what CUDA tensors get; returns the names of the ops that Triton has computed."""
    from clipup_kernels.backends import registry

    computed, function_of = set(), registry.function_of

    def as_on_cuda(op, dtype, device, index=None):
        if registry.choose(op, dtype, "cuda").backend.name == "triton":
            computed.add(op)
        return function_of(op, dtype, "cuda")

    monkeypatch.setattr(registry, "function_of", as_on_cuda)
    monkeypatch.setattr(registry, "_warn_without_triton", lambda index: None)
    return computed


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
