"""Passing tensors to kernels.

Kernels are launched under ``torch.cuda.device_of(tensor)``: on the tensor's device and torch's current stream there.
For CPU tensors (Triton's interpreter) this has no effect.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors; masks as bytes.

    Raises:
        NotImplementedError: bfloat16 in Triton's interpreter.
    """
    if any(t is not None and t.dtype == torch.bfloat16 and _interpreted(t) for t in tensors):
        raise NotImplementedError(
            "Triton's interpreter computes bfloat16 wrongly, without an error; use float16 or float32 there"
        )
    contiguous = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in contiguous]


def _interpreted(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
