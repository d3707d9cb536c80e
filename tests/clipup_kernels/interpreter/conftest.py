"""The tests of this folder hand CPU tensors to the functions that launch Triton's kernels."""

import os

import pytest


@pytest.fixture(autouse=True)
def interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles kernels for its GPU; TRITON_INTERPRET=1 pytest -m interpreter")
