"""What was built and what will run: the compiled extension, if there is one, and ``backend_info()``."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import os
import re
import warnings
from pathlib import Path

import torch

FORCE_BACKEND = "CLIPUP_BACKEND"
"""Environment variable, for comparing and for finding faults: ``reference`` leaves the compiled extension and Triton
unused, ``matmul`` uses the extension for routing and lets torch's matmul compute the products on CPUs."""

FORCE_TIER = "CLIPUP_CPU_ISA"
"""Environment variable; avx512_bf16, avx512, avx2 or portable chooses the micro-kernels instead of the CPU's best."""


def _share_openmp() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to the extension, which is linked to none.

    So there is one thread pool, and ``torch.set_num_threads`` holds for the extension too. Torch's x86-64 wheels load
    the runtime with global symbols already; the aarch64 ones do not.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    loaded = {fields[5] for fields in lines if len(fields) == 6}
    for path in sorted(loaded):
        if re.fullmatch(r"lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*", Path(path).name):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _load_native():
    if os.environ.get(FORCE_BACKEND) == "reference":
        return None, f"{FORCE_BACKEND}=reference is set"
    try:
        _share_openmp()
        return importlib.import_module("clipup_kernels._C"), None
    except ImportError as error:
        warnings.warn(
            f"clipup_kernels runs without its compiled extension ({error}); the CPU ops fall back to plain torch and "
            'are slower. Reinstall with a C++17 compiler: pip install --force-reinstall --no-deps "clipup"',
            RuntimeWarning,
            stacklevel=2,
        )
        return None, str(error)


NATIVE, FALLBACK_REASON = _load_native()


@functools.cache
def matmul_dtypes() -> frozenset[torch.dtype]:
    """The types whose products torch's matmul computes faster than the micro-kernels that this CPU can run."""
    every_type = frozenset({torch.float32, torch.bfloat16, torch.float16})
    if os.environ.get(FORCE_BACKEND) == "matmul":
        return every_type
    if NATIVE is None or os.environ.get(FORCE_TIER):
        return frozenset()
    if NATIVE.instruction_tier() == "portable":
        return every_type
    return frozenset({torch.bfloat16} if NATIVE.has_matrix_tiles() else ())


def release_memory() -> None:
    """Gives the working memory that the CPU kernels keep for later calls back to the system."""
    if NATIVE is not None:
        NATIVE.release_memory()
