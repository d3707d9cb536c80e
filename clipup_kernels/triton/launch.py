"""Passing tensors to kernels.

Kernels are launched under ``torch.cuda.device_of(tensor)``: on the tensor's device and torch's current stream there.
For CPU tensors (Triton's interpreter) this has no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors; masks as bytes."""
    contiguous = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in contiguous]
