"""``backend_info()``: what was built, and which code answers every op."""

from __future__ import annotations

import importlib
import importlib.metadata

import torch

from .backends.extension import FALLBACK_REASON, NATIVE, matmul_dtypes


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_info() -> dict:
    """Says what was built and which implementation every op uses on each device.

    Returns a dict with ``compiled`` (bool), ``fallback_reason`` (why not, or None), ``build`` (compiler, OpenMP and
    CUDA architectures of the extension, or None), ``cpu`` and ``cuda`` (implementation by op), ``cuda_fallback_reason``
    (why Triton does not run there, or None), ``threads`` (what the CPU ops use now), ``instructions`` (the tier of CPU
    kernels), ``matmul_dtypes`` (types whose products torch's matmul computes instead on CPUs), ``kept_memory_bytes``
    (working memory kept for the next call; ``release_memory()`` gives it back) and the versions of clipup, torch and
    triton. Float64 always takes plain torch.
    """
    from .backends import select_cuda

    compiled = NATIVE is not None
    routing = ("router_logits", "topk_gating", "dispatch", "permute", "combine")
    products = ("grouped_linear", "expert_mlp", "dense_mlp")
    cpu = dict.fromkeys((*routing, *products), "c++" if compiled else "torch")
    if compiled and len(matmul_dtypes()) == 3:
        cpu |= dict.fromkeys(products, "torch matmul")
    return {
        "version": _version("clipup"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiled": compiled,
        "fallback_reason": FALLBACK_REASON,
        "build": NATIVE.build_info() if compiled else None,
        "instructions": NATIVE.instruction_tier() if compiled else None,
        "matmul_dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in matmul_dtypes()),
        "kept_memory_bytes": NATIVE.kept_memory() if compiled else 0,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "cuda": {name: select_cuda.implementation(name) for name in (*routing, *products)},
        "cuda_fallback_reason": select_cuda.fallback_reason(),
    }
