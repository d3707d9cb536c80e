"""The tests of this folder run Triton's kernels as compiled for a GPU, on a CPU. See tests/support/ptx."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:  # some platforms have no wheel of it
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def executing(monkeypatch):
    """``ptx.triton_driver.executing``, with the architecture's tiles, and what CUDA tensors get for CPU tensors."""
    import torch
    from ptx import triton_driver

    from clipup_kernels.backends import registry
    from clipup_kernels.triton import configs

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets kernels; TRITON_INTERPRET=0 pytest -m compiled")
    function_of = registry.function_of
    monkeypatch.setattr(registry, "function_of", lambda op, dtype, *device: function_of(op, dtype, "cuda"))
    monkeypatch.setattr(registry, "_warn_without_triton", lambda index: None)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN, so that what a kernel does not write shows

    def execute(arch: int = 80, **options):
        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        return triton_driver.executing(arch, **options)

    yield execute
    torch.use_deterministic_algorithms(before)
