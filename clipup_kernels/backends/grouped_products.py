"""Products of each expert's rows with its weights in plain torch: as many FLOPs as the rows need, no host
synchronization, and sums in a fixed order.

Rows are ordered by expert and ``offsets`` [E + 1] say where each expert begins; how many rows an expert has is known on
the device alone. Two ways:

- ``torch.nn.functional.grouped_mm``, where it neither waits for the device nor refuses the shape: bfloat16 with widths
  that are multiples of 8, on compute capability 9.0 and 10.0, and on CPUs.
- Blocks: the rows are cut into blocks of R / E rows (rounded down) of one expert each. Whatever the routing is, the
  blocks have less than 2 R rows, so that ``torch.bmm`` takes them all. It needs a copy of the weights per block, less
  than 3 E of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import expert_of_row

_GROUPED_MM_CAPABILITIES = ((9, 0), (10, 0))
"""On others, torch's grouped_mm copies the offsets to the host and waits for them."""


class Blocks(NamedTuple):
    """Rows in blocks of ``size`` rows that belong to one expert; N blocks, of which the last may be unused."""

    expert: Tensor
    """[N] int64: the owner, 0 for unused blocks."""
    rows: Tensor
    """[N, size] int64: indices of the rows, 0 where there is none."""
    filled: Tensor
    """[N, size] bool: whether there is a row."""
    counts: Tensor
    """[E] int64: blocks per expert."""
    place: Tensor
    """[R] int64: where each row is in the flattened blocks, 0 for empty rows."""
    owned: Tensor
    """[R] bool: whether a row belongs to an expert."""

    @classmethod
    def of(cls, offsets: Tensor, num_rows: int) -> Blocks:
        offsets = offsets.long()
        num_experts, device = offsets.numel() - 1, offsets.device
        size = max(1, num_rows // num_experts)
        number = (num_rows + min(num_experts, num_rows) * (size - 1)) // size  # an expert's last block may be part full
        starts, ends = offsets[:-1], offsets[1:]
        counts = (ends - starts + size - 1) // size
        after = counts.cumsum(0)
        first = after - counts
        block = torch.arange(number, device=device)
        used = block < after[-1]
        expert = torch.where(used, torch.searchsorted(after, block, right=True), 0)
        begin = starts[expert] + (block - first[expert]) * size
        rows = begin[:, None] + torch.arange(size, device=device)
        filled = used[:, None] & (rows < ends[expert][:, None])
        owner = expert_of_row(offsets, num_rows)
        owned = owner < num_experts
        owner = torch.where(owned, owner, 0)
        place = first[owner] * size + torch.arange(num_rows, device=device) - starts[owner]
        return cls(expert, torch.where(filled, rows, 0), filled, counts, torch.where(owned, place, 0), owned)

    def cut(self, rows: Tensor) -> Tensor:
        """[N, size, D]: rows [R, D] in blocks, 0 where there is none."""
        return torch.where(self.filled[..., None], rows[self.rows], 0)

    def join(self, blocks: Tensor) -> Tensor:
        """[R, D]: the inverse of ``cut``; 0 in empty rows."""
        return torch.where(self.owned[:, None], blocks.flatten(0, 1)[self.place], 0)


def project(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``rows[r] @ weight[e].T + bias[e]`` for every row r of each expert e; 0 in empty rows, which are not read.

    Args:
        rows: [R, I]. weight: [E, O, I], with any strides. bias: [E, O]. All of the same type.
        offsets: [E + 1] int32.

    Returns:
        [R, O].
    """
    num_rows = rows.shape[0]
    if num_rows == 0 or weight.shape[1] == 0:
        return rows.new_zeros(num_rows, weight.shape[1])
    if _grouped_mm_fits(rows, weight.shape[1], weight.shape[2]):
        if bias is not None:
            rows, weight = _with_bias_as_column(rows, weight, bias)
        out = F.grouped_mm(rows.contiguous(), _aligned(weight).mT, offs=offsets[1:])
        return torch.where((torch.arange(num_rows, device=rows.device) < offsets[-1])[:, None], out, 0)
    blocks = Blocks.of(offsets, num_rows)
    cut, weights = blocks.cut(rows), weight[blocks.expert].mT
    if bias is None:
        return blocks.join(torch.bmm(cut, weights))
    return blocks.join(torch.baddbmm(bias[blocks.expert][:, None], cut, weights))


def _with_bias_as_column(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weights with eight more columns, of which the first adds the bias.

    grouped_mm takes none, and a bias added to its result would be added after rounding, which changes the sign of small
    sums.
    """
    ones = rows.new_zeros(rows.shape[0], 8)
    ones[:, 0] = 1
    return torch.cat([rows, ones], 1), torch.cat([weight, F.pad(bias[..., None], (0, 7))], 2)


def _aligned(weight: Tensor) -> Tensor:
    """The weight [E, O, I] with strides that grouped_mm takes: I or O contiguous, the others multiples of 16 bytes."""
    for outer, inner in ((1, 2), (2, 1)):
        others = weight.stride(0), weight.stride(outer)
        dense = weight.stride(inner) == 1 and weight.stride(outer) >= weight.shape[inner]
        if dense and all(stride * weight.itemsize % 16 == 0 for stride in others):
            return weight
    return weight.contiguous()


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """[E, M, N]: the sum of ``left[r, :, None] * right[r, None, :]`` over each expert's rows, in at least float32.

    Args:
        left: [R, M]. right: [R, N] of the same type.
        offsets: [E + 1] int32.
    """
    num_experts = offsets.numel() - 1
    shape = num_experts, left.shape[1], right.shape[1]
    if min(left.numel(), right.numel()) == 0:
        return left.new_zeros(shape)
    if _grouped_mm_fits(left, *shape[1:]):
        out = F.grouped_mm(left.contiguous().mT, right.contiguous(), offs=offsets[1:])
        return torch.where((offsets.diff() > 0)[:, None, None], out, 0)
    blocks = Blocks.of(offsets, left.shape[0])
    lefts, rights = blocks.cut(left).mT, blocks.cut(right)
    if left.dtype in (torch.float32, torch.float64):
        products = torch.bmm(lefts, rights)
    elif left.is_cuda:
        products = torch.bmm(lefts, rights, out_dtype=torch.float32)
    else:
        products = torch.bmm(lefts.float(), rights.float())
    return _segment_sums(products.flatten(1), blocks.counts).view(shape)


def sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """[E, D]: the sum of each expert's rows [R, D], in at least float32."""
    if rows.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return _segment_sums(rows, offsets.diff().long())


def _segment_sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive rows. ``unsafe`` skips checks of the lengths, which are on the device."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def _grouped_mm_fits(rows: Tensor, *widths: int) -> bool:
    if rows.dtype != torch.bfloat16 or any(width == 0 or width % 8 for width in widths):
        return False
    return not rows.is_cuda or torch.cuda.get_device_capability(rows.device) in _GROUPED_MM_CAPABILITIES
