"""The tests of this folder run the kernels for GPUs as compiled, on a CPU. See tests/support/ptx."""

import importlib.metadata
import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:  # some platforms have no wheel of it
    collect_ignore = [f"test_{name}.py" for name in ("forms", "layer", "mutants", "ops", "variants")]


@pytest.fixture
def poisoned():
    """New tensors hold NaN, or the largest integer, so that what a kernel does not write shows."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets kernels; TRITON_INTERPRET=0 pytest -m compiled")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def executing(monkeypatch, poisoned):
    """``ptx.triton_driver.executing``, with the architecture's tiles, and what CUDA tensors get for CPU tensors."""
    from ptx import triton_driver

    from clipup_kernels.backends import registry
    from clipup_kernels.triton import configs

    function_of = registry.function_of
    monkeypatch.setattr(registry, "function_of", lambda op, dtype, *device: function_of(op, dtype, "cuda"))
    monkeypatch.setattr(registry, "_warn_without_triton", lambda index: None)

    # Triton 3.6 writes no proxy fence between cp.async and wgmma: inserted, so that the rest is checked.
    unfenced = importlib.metadata.version("triton").startswith("3.6.")

    def execute(arch: int = 80, change=lambda text: text):
        def fenced(text: str) -> str:
            return change(text.replace("wgmma.fence", "fence.proxy.async.shared::cta;\nwgmma.fence"))

        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        return triton_driver.executing(arch, fenced if unfenced else change)

    return execute
