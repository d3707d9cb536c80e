"""Passing tensors to kernels.

Kernels are launched under ``torch.cuda.device_of(tensor)``: on the tensor's device and torch's current stream there.
For CPU tensors (Triton's interpreter) this has no effect.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import checks

FUSED = {"enable_fp_fusion": True}
"""Option of every kernel: a product and a sum are one instruction. From Triton 3.10 on that is not the default."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Settled when Triton is imported; CPU tensors are always interpreted."""


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors; masks as bytes.

    Raises:
        NotImplementedError: bfloat16 in Triton's interpreter.
        RuntimeError: the memory of a tensor was freed.
    """
    return [None if tensor is None else _readable(tensor.contiguous()) for tensor in tensors]


def stacked(*weights: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Weights [E, N, K] of one shape, each expert's contiguous, and the number of elements from one expert's to the
    next. The halves of one weight [E, 2N, K] are not copied.

    Raises:
        As ``dense``.
    """
    given = [weight for weight in weights if weight is not None]
    strides = {weight.stride(0) for weight in given}
    if len(strides) > 1 or any(weight.stride()[1:] != (weight.shape[2], 1) for weight in given):
        return dense(*weights), given[0].shape[1] * given[0].shape[2]
    return [None if weight is None else _readable(weight) for weight in weights], strides.pop()


def _readable(tensor: Tensor) -> Tensor:
    checks.memory(tensor)
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    if tensor.dtype == torch.bfloat16 and INTERPRETED:
        raise NotImplementedError(
            "Triton's interpreter computes bfloat16 wrongly, without an error; use float16 or float32 there"
        )
    return tensor


def ceil_div(number: int, divisor: int) -> int:
    """Rounded up. Triton's own function is also one for kernels, and takes 5 us."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``, and 1."""
    return 1 << max(0, number - 1).bit_length()
