"""``self_attention``: softmax attention of every head, from queries, keys and values as one projection leaves them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .register import define

_self_attention = define(
    "self_attention(Tensor qkv, Tensor? mask, int heads, str? quantize) -> Tensor",
    flops=lambda arguments: 4 * math.prod(arguments["qkv"]) * arguments["qkv"][1] // 3,
)


def self_attention(qkv: Tensor, heads: int, mask: Tensor | None = None, quantize: str | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + mask) v`` of every head, for inference. Float32, bfloat16, float16 or float64; sums
    and softmax are at least float32, but where CPUs multiply pairs of bfloat16, shares of bfloat16 are rounded to it.

    Args:
        qkv: [B, L, 3 * heads * d]: queries, keys and values of every token, each [heads, d].
        heads: the number of heads.
        mask: None, or what is added to the scores: float32 [B or 1, heads or 1, L, L]. A query whose keys are all
            ``-inf`` gives 0.
        quantize: "int8" for products in int8 where a kernel has them (the compiled extension; not for bfloat16 in AMX
            tiles, where they are slower); queries are quantized by row, keys by row and values by channel after their
            mean over the sequence is subtracted, so that a result depends on the whole sequence, masked tokens
            included.

    Returns:
        [B, L, heads * d].

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    checks.tensor("qkv", qkv, ("B", "L", "3*heads*d"), checks.FLOATING, qkv)
    batch, length, width = qkv.shape
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"heads must divide qkv's last size by three, {width}/3, got {heads}")
    if mask is not None:
        checks.tensor("mask", mask, ("B", "heads", length, length), (torch.float32,), qkv)
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
            raise ValueError(
                f"mask must have shape [{batch} or 1, {heads} or 1, {length}, {length}], got {list(mask.shape)}"
            )
    checks.quantization(quantize)
    return _self_attention(qkv, mask, heads, quantize)
