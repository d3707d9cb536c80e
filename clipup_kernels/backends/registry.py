"""Which backend computes which op, on which device and in which type: one table, best first.

A further backend is a module with functions that are named after ops, and an entry in ``BACKENDS``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATING
from ..types import quantization_of, type_name
from . import extension
from .extension import FORCE_BACKEND, FORCE_TIER

ROUTING = ("router_logits", "router_logits_backward", "topk_gating", "topk_gating_backward", "dispatch")
ROWS = ("permute", "gather_sum", "combine", "combine_backward")
PRODUCTS = (
    *("grouped_linear", "grouped_linear_backward", "expert_mlp_forward", "expert_mlp_backward", "dense_mlp"),
    *("expert_glu_forward", "expert_glu_backward", "self_attention"),
)
"""``dense_mlp`` and ``self_attention`` are for inference: on CUDA devices they are torch's own products."""
PACKED = ("packed_grouped_linear", "packed_expert_mlp", "packed_dense_mlp", "packed_sparse_mlp")


class Backend(NamedTuple):
    """One implementation of some ops."""

    name: str
    """Its name in ``CLIPUP_BACKEND`` and in ``backend_info()``."""
    device: str | None
    """The device type that it runs on; None: all."""
    modules: Mapping[str, str]
    """For every op that it computes, the module (under ``clipup_kernels``) that has a function of the op's name. It is
    imported at the op's first call."""
    unavailable: Callable[[int | None], str | None]
    """Why it cannot run; None where it can. Takes the index of a CUDA device; None asks about the installation."""
    preferred: Callable[[str, torch.dtype], str | None]
    """Why it comes before the backends below it for an op and a type; None: it runs only if ``CLIPUP_BACKEND`` names
    it."""
    float64: bool = False
    """Whether it also computes in float64."""

    def computes(self, op: str, dtype: torch.dtype, device: str) -> bool:
        return op in self.modules and self.device in (None, device) and (self.float64 or dtype != torch.float64)


_DISTRUSTED: dict[tuple[str, str, torch.dtype, int | None], str] = {}
"""Why a backend does not compute an op in a type on a CUDA device (None: on the CPU): it failed its self-check."""
_SAME_CODE = {
    "packed_grouped_linear": "grouped_linear",
    "packed_expert_mlp": "expert_mlp_forward",
    "packed_dense_mlp": "dense_mlp",
    "packed_sparse_mlp": "expert_mlp_forward",
}
"""Ops that are not checked themselves, and the op whose check stands for theirs."""


class Choice(NamedTuple):
    """The backend that computes an op, and why it does."""

    backend: Backend
    reason: str


def _without_extension(index: int | None = None) -> str | None:
    return None if extension.NATIVE is not None else f"there is no compiled extension ({extension.FALLBACK_REASON})"


def _without_triton(index: int | None = None) -> str | None:
    if torch.version.hip is not None:
        return "this torch is built for ROCm, where the kernels are untested"
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; install it with: pip install "triton"'
    if index is not None and (capability := torch.cuda.get_device_capability(index)) < (8, 0):
        return f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    return None


def _without_cuda_extension(index: int | None = None) -> str | None:
    without_cuda = "the compiled extension was built without CUDA"
    return _without_extension() or (None if extension.NATIVE.build_info()["cuda"] else without_cuda)


def _matmul_is_faster(op: str, dtype: torch.dtype) -> str | None:
    """Where torch uses threads or instructions that the kernels of csrc/cpu lack, or these were never timed."""
    if os.environ.get(FORCE_TIER):
        return None
    tier = extension.NATIVE.instruction_tier()
    if tier == "portable":
        return "the C++ kernels use no vector instructions of this CPU"
    if tier == "neon_dotprod":
        return "the C++ kernels for aarch64 were never timed on a CPU; int8 weights use them"
    if not extension.NATIVE.build_info()["openmp"]:
        return "the extension was built without g++'s OpenMP, so its kernels run on one thread"
    if dtype == torch.bfloat16 and extension.NATIVE.has_matrix_tiles() and tier != "amx":
        return f"this CPU multiplies bfloat16 in AMX tiles, which the C++ kernels' tier {tier} does not use"
    if dtype == torch.bfloat16 and tier == "amx" and op.endswith("_backward"):
        return "this CPU multiplies bfloat16 in AMX tiles, which the C++ kernels use for no gradient of a weight"
    return None


BACKENDS = (
    Backend(
        "torch_matmul", "cpu", dict.fromkeys(PRODUCTS, "backends.torch_matmul"), _without_extension, _matmul_is_faster
    ),
    Backend(
        "cpp",
        "cpu",
        dict.fromkeys((*ROUTING, *ROWS, *PRODUCTS, *PACKED), "backends.cpp"),
        _without_extension,
        lambda op, dtype: "the extension is compiled",
    ),
    Backend(
        "triton",
        "cuda",
        {
            "router_logits": "triton.router_logits",
            "router_logits_backward": "triton.router_logits",
            "topk_gating": "triton.topk_gating",
            "topk_gating_backward": "triton.topk_gating",
            "dispatch": "triton.dispatch",
            **dict.fromkeys(ROWS, "triton.rows"),
            "grouped_linear": "triton.grouped_linear",
            "grouped_linear_backward": "triton.grouped_linear",
            "expert_mlp_forward": "triton.expert_mlp",
            "expert_mlp_backward": "triton.expert_mlp_backward",
            "expert_glu_forward": "triton.expert_mlp",
            "expert_glu_backward": "triton.expert_mlp_backward",
        },
        _without_triton,
        lambda op, dtype: "Triton is installed",
    ),
    Backend(  # not yet measured on a GPU (benchmarks/gpu_stages.py)
        "cpp_cuda",
        "cuda",
        dict.fromkeys(("topk_gating", "topk_gating_backward", "dispatch"), "backends.cpp_cuda"),
        _without_cuda_extension,
        lambda op, dtype: None,
    ),
    Backend(
        "torch_eager",
        None,
        dict.fromkeys((*ROUTING, *ROWS, *PRODUCTS), "backends.torch_eager"),
        lambda index: None,
        lambda op, dtype: "it computes every op in every type on any device",
        float64=True,
    ),
)
"""Best first: an op goes to the first backend that computes it, is available and is preferred to those below it."""


def forced() -> str | None:
    """The backend that ``CLIPUP_BACKEND`` names: it computes every op that it has.

    Raises:
        ValueError: no backend has this name.
    """
    name = os.environ.get(FORCE_BACKEND)
    names = [backend.name for backend in BACKENDS]
    if name and name not in names:
        raise ValueError(f"{FORCE_BACKEND} must be one of {', '.join(names)}, or unset; got {name!r}")
    return name or None


forced()  # an unknown name is refused at import


def choose(op: str, dtype: torch.dtype, device: str, index: int | None = None) -> Choice:
    """The backend for an op whose first argument has type ``dtype``.

    Args:
        device: the device type, "cpu" or "cuda".
        index: of the CUDA device; None asks about the installation and touches no GPU.

    Raises:
        RuntimeError: ``CLIPUP_BACKEND`` names a backend that cannot run, or no backend computes the op.
    """
    possible = choices(op, dtype, device, index)
    for choice in possible:
        failure = failed_check(choice.backend, op, dtype, index)
        if failure is None:
            return choice
        if choice.backend.name == forced():
            raise RuntimeError(
                f"{FORCE_BACKEND}={choice.backend.name} is set, but {failure}; unset it to run another backend"
            )
    reasons = [f"{choice.backend.name}: {failed_check(choice.backend, op, dtype, index)}" for choice in possible]
    reasons += [
        f"{backend.name}: {reason}"
        for backend in BACKENDS
        if backend.computes(op, dtype, device) and (reason := backend.unavailable(index)) is not None
    ]
    raise RuntimeError(
        f"no backend computes {op} in {dtype} on {device} ({'; '.join(reasons) or 'it has no kernel there'})"
    )


def choices(op: str, dtype: torch.dtype, device: str, index: int | None = None) -> list[Choice]:
    """The backends that can compute an op, best first, whether they are trusted or not; with ``CLIPUP_BACKEND`` that
    one alone, if it has the op. ``choose`` describes arguments and errors."""
    candidates = [backend for backend in BACKENDS if backend.computes(op, dtype, device)]
    name = forced()
    for backend in candidates:
        if backend.name == name:
            if (reason := backend.unavailable(index)) is not None:
                raise RuntimeError(f"{FORCE_BACKEND}={name} is set, but {reason}; unset it to run another backend")
            return [Choice(backend, f"{FORCE_BACKEND}={name} is set")]
    return [
        Choice(backend, reason)
        for backend in candidates
        if backend.unavailable(index) is None and (reason := backend.preferred(op, dtype)) is not None
    ]


def distrust(backend: str, op: str, dtype: torch.dtype, reason: str | None, index: int | None = None) -> None:
    """From now on, a backend does not compute an op whose first argument has this type on a device; or, without a
    reason, it does again.

    Args:
        index: of the CUDA device; None for the CPU.
    """
    _DISTRUSTED.pop((backend, op, dtype, index), None)
    if reason is not None:
        _DISTRUSTED[backend, op, dtype, index] = reason
    function_of.cache_clear()
    all_computed_by.cache_clear()


def failed_check(backend: Backend, op: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why a backend is not trusted with an op; None if it is. Without an index, on any device."""
    checked = _SAME_CODE.get(op, op)
    for (name, distrusted_op, type_, device), reason in list(_DISTRUSTED.items()):
        if (name, distrusted_op, type_) == (backend.name, checked, dtype) and index in (None, device):
            return f"{checked} in {dtype} failed its self-check ({reason})"
    return None


def distrusted() -> dict[str, str]:
    """What failed its self-check, by backend, op, type and CUDA device, and why."""
    return {
        f"{backend} {op} {type_name(dtype)}{'' if index is None else f' cuda:{index}'}": reason
        for (backend, op, dtype, index), reason in list(_DISTRUSTED.items())
    }


def implementation(backend: Backend, op: str) -> Callable:
    """A backend's function for an op; imports its module. Autocast is off while it runs: the types of results and of
    sums are part of an op's contract."""
    function = getattr(importlib.import_module(f"clipup_kernels.{backend.modules[op]}"), op)

    @functools.wraps(function)
    def without_autocast(first: Tensor, *args):
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return function(first, *args)
        with torch.autocast(device, enabled=False):
            return function(first, *args)

    return without_autocast


def type_of_first(op: str, dtype: torch.dtype) -> torch.dtype:
    """The type of an op's first argument, by which its backend is chosen, for tokens of a type: logits and their
    gradients are at least float32, and ``dispatch`` gets indices."""
    if op == "dispatch":
        return torch.int32
    if op in ("topk_gating", "topk_gating_backward", "router_logits_backward"):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def table(device: str) -> dict[str, dict[torch.dtype, Choice | None]]:
    """The choice for every op and type of tokens on a device type of this installation; touches no GPU. None: a call
    raises, because the backend that is forced failed its self-check."""

    def choice(op: str, dtype: torch.dtype) -> Choice | None:
        first = type_of_first(op, dtype)
        possible = choices(op, first, device)
        trusted = any(failed_check(candidate.backend, op, first) is None for candidate in possible)
        return choose(op, first, device) if trusted or not possible else None

    return {op: {dtype: choice(op, dtype) for dtype in FLOATING} for op in (*ROUTING, *ROWS, *PRODUCTS)}


@functools.cache
def function_of(op: str, dtype: torch.dtype, device: str, index: int | None = None) -> Callable:
    """The function that computes an op; imports its module, and warns once for a GPU that cannot run Triton."""
    backend, _ = choose(op, dtype, device, index)
    if device == "cuda" and dtype != torch.float64 and backend.name != forced():
        _warn_without_triton(index)
    return implementation(backend, op)


@functools.cache
def all_computed_by(backend: str, ops: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether a backend is chosen for each of these ops on the CPU, for tokens of a type."""
    return all(choose(op, type_of_first(op, dtype), "cpu").backend.name == backend for op in ops)


@functools.cache
def _warn_without_triton(index: int) -> None:
    if (reason := _without_triton(index)) is not None:
        warnings.warn(
            f"clipup_kernels runs plain torch on cuda:{index}, which is slower ({reason})", RuntimeWarning, stacklevel=4
        )


def kernel_of(op: str, device: str) -> Callable:
    """What is registered for an op on a device type: it looks up the backend at every call."""

    def kernel(first: Tensor, *args):
        return function_of(op, first.dtype, device, first.device.index)(first, *args)

    return kernel


def packed_kernel_of(op: str, check_layout: Callable[[torch.dtype, str], None]) -> Callable:
    """``kernel_of`` on the CPU for an op on packed weights: its last argument, the layout, is checked, and replaced by
    the quantization that it implies.

    The layout is an argument of the op because an exported program may run on another machine than it was made on.
    """

    def kernel(first: Tensor, *args):
        *others, layout = args
        check_layout(first.dtype, layout)
        return function_of(op, first.dtype, "cpu")(first, *others, quantization_of(layout))

    return kernel
