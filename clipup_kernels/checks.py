"""Argument checks of the public ops: every error names the argument, the value and what was expected."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .types import ACTIVATIONS, MAX_EXPERTS, QUANTIZATIONS, PackedWeight, Plan, type_name

_MEMORY = 1 << 40
"""No offset in a storage is so large: from here on an address is in memory."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Any, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Checks one tensor. A letter in ``shape`` matches any size; an int must match."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:  # their sizes and memory are not what the kernels read
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}")
    if not _fits(value, shape):  # formatted only here: torch.compile cannot trace it for symbolic sizes
        want = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{want}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(type_name(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {type_name(value.dtype)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the other arguments are on {like.device}; move it there")


def _fits(value: Tensor | PackedWeight, shape: tuple[int | str, ...]) -> bool:
    sizes = zip(value.shape, shape, strict=False)
    return len(value.shape) == len(shape) and all(isinstance(size, str) or have == size for have, size in sizes)


def memory(value: Tensor) -> None:
    """
    Raises:
        RuntimeError: it has elements and no memory, which a kernel would read.
    """
    at = value.data_ptr()
    if at < _MEMORY and at == value.storage_offset() * value.itemsize and value.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(value.shape)} has no memory: its storage was freed, as FSDP does with weights "
            "outside of their layer's forward and backward pass; call the layer through its FSDP module"
        )


def optional(name: str, value: Tensor | None, shape: tuple, dtypes: tuple, like: Tensor) -> None:
    if value is not None:
        tensor(name, value, shape, dtypes, like)


def same_dtype(x_name: str, x: Tensor, **others: Any) -> None:
    """Refuses a mix of floating types by name: casting is up to the caller (the layer, or autocast). ``others`` are
    tensors, packed weights or None."""
    for name, value in others.items():
        if value is not None and value.dtype != x.dtype:
            raise TypeError(
                f"{name} is {type_name(value.dtype)} but {x_name} is "
                f"{type_name(x.dtype)}; the op computes in one type, cast one of them"
            )


def quantization(quantize: str | None) -> None:
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be None or one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")


def boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def num_experts(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or not 1 <= value <= MAX_EXPERTS:
        raise ValueError(f"num_experts must be an int from 1 to {MAX_EXPERTS}, got {value!r}")


def top_k(k: int, num_experts: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts ({num_experts}), got {k}")


def row_count(num_tokens: int, k: int) -> None:
    """Row numbers are int32."""
    if num_tokens * k >= 2**31:
        raise ValueError(f"T*K: expected fewer than 2^31 rows, got {num_tokens} tokens of {k} choices")


def capacity_factor(value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"capacity_factor must be a number or None, got {type(value).__name__}")
    if not 0 < value <= sys.float_info.max:  # torch.compile cannot trace math.isfinite for a symbolic float
        raise ValueError(f"capacity_factor must be positive and finite, or None to drop nothing, got {value}")


def activation(name: str) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def plan(value: Plan, num_tokens: int | str, like: Tensor, num_experts: int | str = "E") -> None:
    """Checks the plan's shapes against ``num_tokens`` (an int, or a letter if the caller has no tokens)."""
    if not isinstance(value, Plan):
        raise TypeError(f"plan must be the Plan that dispatch() returns, got {type(value).__name__}")
    int32 = (torch.int32,)
    offsets = (num_experts + 1,) if isinstance(num_experts, int) else ("E+1",)
    tensor("plan.offsets", value.offsets, offsets, int32, like)
    tensor("plan.row_of_choice", value.row_of_choice, (num_tokens, "K"), int32, like)
    tokens, k = value.row_of_choice.shape
    tensor("plan.choice_of_row", value.choice_of_row, (tokens * k,), int32, like)


def gates(value: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Gates are float32 for every type of rows (float64 for float64)."""
    tensor("gates", value, shape, (torch.float64 if like.dtype == torch.float64 else torch.float32,), like)


def routed(x: Tensor, value: Tensor, of_plan: Plan, num_experts: int, recompute: str) -> None:
    """Checks what experts get beside their weights: gates, plan and ``recompute``."""
    if recompute not in ("none", "full"):
        raise ValueError(f"recompute must be 'none' or 'full', got {recompute!r}")
    plan(of_plan, x.shape[0], x, num_experts)
    gates(value, x, tuple(of_plan.row_of_choice.shape))


def packed(name: str, value: Any, shape: tuple[int | str, ...], x: Tensor) -> None:
    """Checks a packed weight for a product with x; ``shape`` as in ``tensor``."""
    if not isinstance(value, PackedWeight):
        raise TypeError(f"{name} must be packed like the other weights, got {type(value).__name__}; pack all or none")
    if not _fits(value, shape):
        want = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be packed from a weight of shape [{want}], got {list(value.shape)}")
    if not x.is_cpu:
        raise ValueError(f"x is on {x.device}, but {name} is packed for CPUs; use the plain weight there")
    if not value.block.is_cpu:
        raise ValueError(f"{name} is on {value.device}, but packed weights are read on CPUs; load or pack it there")


def no_gradient(*tensors: Tensor | None) -> None:
    """Refuses packed weights if a gradient is required."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "packed weights have no derivative, but the input or a parameter requires a gradient, as after "
            "requires_grad_(True) on a model that clipup.accelerate prepared: compute under torch.no_grad() or "
            "torch.inference_mode(), or train the plain weights"
        )
