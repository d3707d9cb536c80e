"""Passing tensors to kernels.

Kernels are launched under ``torch.cuda.device_of(tensor)``: on the tensor's device and torch's current stream there.
For CPU tensors (Triton's interpreter) this has no effect.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

FUSED = {"enable_fp_fusion": True}
"""Option of every kernel: a product and a sum are one instruction. From Triton 3.10 on that is not the default."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Settled when Triton is imported; CPU tensors are always interpreted."""


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors; masks as bytes.

    Raises:
        NotImplementedError: bfloat16 in Triton's interpreter.
    """
    results: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.contiguous()
            dtype = tensor.dtype
            if dtype == torch.bool:
                tensor = tensor.view(torch.uint8)
            elif dtype == torch.bfloat16 and (INTERPRETED or not tensor.is_cuda):
                raise NotImplementedError(
                    "Triton's interpreter computes bfloat16 wrongly, without an error; use float16 or float32 there"
                )
        results.append(tensor)
    return results


def ceil_div(number: int, divisor: int) -> int:
    """Rounded up. Triton's own function is also one for kernels, and takes 5 us."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``, and 1."""
    return 1 << max(0, number - 1).bit_length()
