"""``backend_info()``: how the extension was built, and which backend computes every op."""

from __future__ import annotations

import importlib.metadata

import torch

from .backends import registry
from .backends.extension import FALLBACK_REASON, NATIVE
from .types import type_name

_OPS = {
    "router_logits": "router_logits", "topk_gating": "topk_gating", "dispatch": "dispatch", "permute": "permute",
    "combine": "combine", "grouped_linear": "grouped_linear", "expert_mlp": "expert_mlp_forward",
    "expert_glu": "expert_glu_forward",
    "dense_mlp": "dense_mlp", "self_attention": "self_attention",
}  # fmt: skip
"""Public ops, and the registered op that computes each."""


def package_version(package: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_info() -> dict:
    """What was built, and which backend computes every op on each device and in each type; touches no GPU.

    Returns:
        A dict with ``version`` (of clipup), ``torch``, ``triton`` (their versions);
        ``compiled`` (bool), ``fallback_reason`` (why not, or None), ``build`` (compiler, OpenMP and CUDA architectures
        of the extension, or None), ``instructions`` (instruction tier of the C++ kernels, or None);
        ``cpu`` and ``cuda`` (for every op the backend by type of the tokens: ``info["cpu"]["expert_mlp"]["bfloat16"]``;
        None where a call raises because the forced backend failed its self-check),
        ``backends`` (why each of them is used, or why not), ``forced`` (what ``CLIPUP_BACKEND`` names, or None),
        ``failed_checks`` (why ops failed ``clipup_kernels.self_check`` in this process, by backend, op and type),
        ``cuda_fallback_reason`` (why Triton is not used, or None), ``matmul_dtypes`` (types whose products are left to
        torch's matmul on this CPU);
        ``threads`` (of the CPU ops), ``kept_memory_bytes`` (working memory kept for the next call;
        ``release_memory()`` gives it back), ``used_memory_bytes`` (in use: packed weights, and large gradients while
        they are alive).

    Raises:
        RuntimeError: ``CLIPUP_BACKEND`` names a backend that cannot run here.
    """
    compiled = NATIVE is not None
    tables = {device: registry.table(device) for device in ("cpu", "cuda")}
    used = {
        choice.backend.name: choice.reason
        for choices in tables.values()
        for by_type in choices.values()
        for choice in by_type.values()
        if choice is not None
    }
    backends = {
        backend.name: backend.unavailable(None) or used.get(backend.name, "it can run, but no op uses it here")
        for backend in registry.BACKENDS
    }
    products = tables["cpu"]["expert_mlp_forward"]
    forced = registry.forced()
    return {
        "version": package_version("clipup"),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "compiled": compiled,
        "fallback_reason": FALLBACK_REASON,
        "build": NATIVE.build_info() if compiled else None,
        "instructions": NATIVE.instruction_tier() if compiled else None,
        **{
            device: {
                op: {type_name(dtype): choice and choice.backend.name for dtype, choice in choices[registered].items()}
                for op, registered in _OPS.items()
            }
            for device, choices in tables.items()
        },
        "backends": backends,
        "forced": forced,
        "failed_checks": registry.distrusted(),
        "cuda_fallback_reason": None if "triton" in used else backends["triton"],
        "matmul_dtypes": sorted(
            type_name(d)
            for d, choice in products.items()
            if choice is not None and choice.backend.name == "torch_matmul"
        ),
        "threads": torch.get_num_threads(),
        "kept_memory_bytes": NATIVE.kept_memory() if compiled else 0,
        "used_memory_bytes": NATIVE.used_memory() if compiled else 0,
    }
