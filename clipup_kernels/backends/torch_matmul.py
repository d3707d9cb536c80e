"""torch_eager's grouped_linear and expert_mlp with other parts: torch's matmul expert by expert, and rows moved in C++.

For CPUs where that is faster than the micro-kernels of csrc/cpu (``registry``).
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from .. import glu
from . import torch_eager
from .cpp import combine, gather_sum, permute  # noqa: F401  parts of torch_eager's functions
from .plan_checks import check_offsets
from .torch_eager import dense_mlp  # noqa: F401  it already uses torch's matmul


def _spans(offsets: Tensor, num_rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows). Products over no rows are zeros."""
    check_offsets(offsets, num_rows)
    edges = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]


def project(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """As in ``grouped_products``."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, span in _spans(offsets, len(rows)):
        if bias is None:
            torch.mm(rows[span], weight[expert].mT, out=out[span])
        else:
            torch.addmm(bias[expert], rows[span], weight[expert].mT, out=out[span])
    out[int(offsets[-1]) :] = 0
    return out


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """[E, M, N] of the rows' type: the products of ``grouped_products``."""
    out = left.new_empty(len(offsets) - 1, left.shape[1], right.shape[1])
    for expert, span in _spans(offsets, len(left)):
        torch.mm(left[span].mT, right[span], out=out[expert])
    return out


def sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """As in ``grouped_products``."""
    out = rows.new_empty(len(offsets) - 1, rows.shape[1], dtype=torch.float32)
    for expert, span in _spans(offsets, len(rows)):
        torch.sum(rows[span], 0, dtype=torch.float32, out=out[expert])
    return out


_PARTS = sys.modules[__name__]
grouped_linear = partial(torch_eager.grouped_linear, parts=_PARTS)
grouped_linear_backward = partial(torch_eager.grouped_linear_backward, parts=_PARTS)
expert_mlp_forward = partial(torch_eager.expert_mlp_forward, parts=_PARTS)
expert_mlp_backward = partial(torch_eager.expert_mlp_backward, parts=_PARTS)
expert_glu_forward, expert_glu_backward = glu.forward_of(expert_mlp_forward), glu.backward_of(expert_mlp_backward)


_LONGEST_PRODUCT = 512
"""Tokens up to which plain products of bfloat16 are faster on a CPU than torch's fused attention: 12.3 to 18.0 ms for
96 heads, 197 tokens and one thread of Zen 4."""


def self_attention(qkv, mask, heads, quantize) -> Tensor:
    batch, length, width = qkv.shape
    if qkv.dtype != torch.bfloat16 or length > _LONGEST_PRODUCT:
        return torch_eager.self_attention(qkv, mask, heads, quantize)
    d = width // 3 // heads
    q, k, v = qkv.view(batch, length, 3, heads, d).permute(2, 0, 3, 1, 4).flatten(1, 2)
    scores = torch.bmm(q * d**-0.5, k.mT).view(batch, heads, length, length)
    if mask is not None:
        scores += mask.clamp_min(torch.finfo(scores.dtype).min).to(scores.dtype)  # a row of -inf would become NaN
    shares = torch.softmax(scores, -1)
    if mask is not None:
        shares = shares.masked_fill_((mask == float("-inf")).all(-1, keepdim=True), 0)
    attended = torch.bmm(shares.view(batch * heads, length, length), v)
    return attended.view(batch, heads, length, d).transpose(1, 2).reshape(batch, length, width // 3)
