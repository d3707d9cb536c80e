"""Weights in the order in which the CPU kernels read them, kept between calls while they do not change.

Packing a weight costs as much as multiplying a dozen rows with it, so that inference with few tokens an expert gains by
packing once. A weight is packed when it is seen unchanged for the second time, outside of training, and the copy goes
when the weight goes. It counts as unchanged while its object, its address and its version are the same, and a sample of
its bytes: writes through ``.data`` leave the version alone. Inference tensors have no version and are never kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import info

DISABLE = "CLIPUP_PACK_WEIGHTS"
"""Environment variable; ``0`` keeps no packed weights."""

_enabled = os.environ.get(DISABLE) != "0"
_kept = WeakTensorKeyDictionary()


@dataclass
class _Entry:
    stamp: tuple
    packed: Tensor | None = None


def pack_weights(enabled: bool) -> None:
    """Says whether the CPU kernels may keep packed copies of weights between inference calls; they do by default.

    The copies cost as much memory as the weights, twice as much where a 16-bit type is widened to float32
    (``backend_info()["packed_weights"]`` has the bytes). False also drops those that are kept.
    """
    global _enabled
    _enabled = enabled
    if not enabled:
        _kept.clear()


def release_memory() -> None:
    """Gives back what the CPU kernels keep for later calls: working memory and packed weights."""
    _kept.clear()
    if info.NATIVE is not None:
        info.NATIVE.release_memory()


def kept_bytes() -> int:
    return sum(entry.packed.numel() for entry in _kept.values() if entry.packed is not None)


def status() -> dict:
    """What ``backend_info()`` says about packed weights."""
    return {"enabled": _enabled, "bytes": kept_bytes()}


def forget(weight: Tensor) -> None:
    """Drops the weight's packed form: it is being trained."""
    _kept.pop(weight, None)


def packed(weight: Tensor, dtype_code: int) -> Tensor | None:
    """The packed form of ``weight`` [E, O, I] or [O, I], or None where it is not (yet) worth keeping."""
    if not _enabled or weight.is_inference() or not weight.is_contiguous():
        return None
    size = weight.numel() * weight.element_size()
    stamp = (weight._version, weight.data_ptr(), weight.shape, info.NATIVE.sample_hash(weight.data_ptr(), size))
    entry = _kept.get(weight)
    if entry is None or entry.stamp != stamp:
        _kept[weight] = _Entry(stamp)
        return None
    if entry.packed is None:
        shape = (1, *weight.shape)[-3:]
        block = info.NATIVE.Block(max(info.NATIVE.packed_weight_bytes(dtype_code, *shape), 1))
        entry.packed = torch.frombuffer(block, dtype=torch.uint8)
        info.NATIVE.pack_weight(dtype_code, weight.data_ptr(), *shape, entry.packed.data_ptr())
    return entry.packed
