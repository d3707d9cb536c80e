"""How tensors are handed to kernels.

Kernels start under ``torch.cuda.device_of(tensor)``: on the tensor's device, on torch's current stream there. For CPU
tensors, which Triton's interpreter takes, that changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors contiguous, and masks as bytes, which Triton loads as they are."""
    contiguous = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in contiguous]
