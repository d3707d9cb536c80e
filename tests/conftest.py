"""Triton's kernels are interpreted on CPU tensors without a GPU that could run them.

Whether a process compiles kernels or interprets them is settled when it imports Triton, which torch and others do for
reasons of their own, so it is settled here, in front of everything. On a machine with a GPU kernels are compiled, and
``TRITON_INTERPRET=1 pytest -m interpreter`` interprets them there too. ``TRITON_INTERPRET=0 pytest -m compiled``
compiles them without a GPU, for the executor of PTX.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; runs would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
