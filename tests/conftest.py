"""Triton's kernels are interpreted on CPU tensors where there is no GPU that could run them.

Whether a process compiles kernels or interprets them is settled when it imports Triton, which torch and others do for
reasons of their own, so it is settled here, in front of everything. On a machine with a GPU kernels are compiled, and
``TRITON_INTERPRET=1 pytest -m interpreter`` interprets them there too.
"""

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def log_level_stays_as_it_was():
    """Commands set the root logger's level, which later tests in the same process would see."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
