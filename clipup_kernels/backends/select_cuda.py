"""What answers an op on CUDA tensors: Triton kernels (``triton/``) or plain torch (``generic``)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import extension, torch_eager

_TRITON_FILE = {
    "router_logits": "router",
    "router_logits_backward": "router",
    "topk_gating": "gating",
    "topk_gating_backward": "gating",
    "dispatch": "dispatch",
    "permute": "rows",
    "gather_sum": "rows",
    "combine": "rows",
    "combine_backward": "rows",
    "grouped_linear": "grouped_linear",
    "grouped_linear_backward": "grouped_linear",
    "expert_mlp_forward": "expert_mlp",
    "expert_mlp_backward": "expert_mlp_backward",
}
"""Where under ``triton/`` an op's kernels are; plain torch answers the others."""

_OLDEST = (8, 0)
"""The lowest compute capability that Triton compiles for."""


@functools.cache
def fallback_reason() -> str | None:
    """Why no op runs on Triton in this installation; None where they do. Looks at no device."""
    if os.environ.get(extension.FORCE_BACKEND) == "reference":
        return f"{extension.FORCE_BACKEND}=reference is set"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, where the kernels have not been tried"
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; install it with: pip install "triton"'
    return None


@functools.cache
def _runs_triton(device_index: int) -> bool:
    """Whether Triton's kernels run on a device; warns once where they do not and nobody asked for it."""
    reason = fallback_reason()
    if reason is None:
        capability = torch.cuda.get_device_capability(device_index)
        if capability >= _OLDEST:
            return True
        reason = f"cuda:{device_index} has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    if extension.FORCE_BACKEND not in reason:
        warnings.warn(
            f"clipup_kernels runs plain torch on cuda:{device_index}, which is slower ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
    return False


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"clipup_kernels.triton.{_TRITON_FILE[name]}")


def implementation(name: str) -> str:
    """What this installation runs for op ``name`` in float32, bfloat16 and float16: "triton" or "torch"."""
    has_kernels = name in _TRITON_FILE or f"{name}_forward" in _TRITON_FILE
    return "triton" if has_kernels and fallback_reason() is None else "torch"


def kernel_of(name: str) -> Callable:
    """The function that computes op ``name``: it chooses by type and device at every call."""

    def chosen(first: Tensor, *args):
        use_triton = name in _TRITON_FILE and first.dtype != torch.float64 and _runs_triton(first.device.index)
        return getattr(_kernels(name) if use_triton else torch_eager, name)(first, *args)

    return chosen
