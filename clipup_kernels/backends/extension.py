"""The compiled extension, if there is one: loading it, and its memory."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import warnings
from pathlib import Path

import torch

from ..types import ACTIVATIONS

FORCE_BACKEND = "CLIPUP_BACKEND"
"""Environment variable, for comparisons and for debugging: the backend (``registry.BACKENDS``) that computes every op
that it has. ``torch_eager`` has all of them, so that neither the compiled extension nor Triton is used."""

FORCE_TIER = "CLIPUP_CPU_ISA"
"""Environment variable: the instruction tier of the C++ kernels, instead of the fastest one of this CPU. An unknown
name is refused with the tiers that this CPU has; docs/kernels.md describes them."""


def _share_openmp() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to the extension, which is linked to none.

    This way there is one thread pool, and ``torch.set_num_threads`` applies to the extension too. Torch's x86-64
    wheels load the runtime with global symbols already; the aarch64 wheels do not.
    """
    maps = Path("/proc/self/maps")
    if maps.exists():
        for path in _openmp_runtimes(maps.read_text(), Path(torch.__file__).resolve().parent):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _openmp_runtimes(maps: str, torch_home: Path) -> list[str]:
    """The paths of the OpenMP runtimes in a process's memory map. Torch's own comes first, because the first made
    visible is used, and faiss and scikit-learn bring theirs."""
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    loaded = {fields[5] for fields in lines if len(fields) == 6}
    runtimes = [path for path in loaded if re.fullmatch(r"lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*", Path(path).name)]
    own = (f"{torch_home}/", f"{torch_home}.libs/")
    return sorted(runtimes, key=lambda path: (not path.startswith(own), path))


def _load_native():
    if os.environ.get(FORCE_BACKEND) == "torch_eager":
        return None, f"{FORCE_BACKEND}=torch_eager is set"
    try:
        _share_openmp()
        native = importlib.import_module("clipup_kernels._C")
        if getattr(native, "ACTIVATIONS", None) != ACTIVATIONS:  # activations are passed as positions in this list
            raise ImportError("clipup_kernels._C was built from other sources than this package")
        return native, None
    except ImportError as error:
        warnings.warn(
            f"clipup_kernels in {Path(__file__).parents[1]} runs without its compiled extension ({error}); the CPU ops "
            "fall back to plain torch and are slower. Install clipup again with a C++17 compiler; if that directory is "
            "a clone, which comes before an installed clipup where Python is started in it: pip install --editable .",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, str(error)


NATIVE, FALLBACK_REASON = _load_native()


def release_memory() -> None:
    """Gives back to the system the working memory that the CPU kernels keep for later calls."""
    if NATIVE is not None:
        NATIVE.release_memory()
