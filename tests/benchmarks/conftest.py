"""Programs about Triton's kernels have tests only where Triton is installed."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore = [f"test_{name}.py" for name in ("gpu_kernels", "gpu_static", "grouped_peers")]


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
