"""permute, gather_sum, combine and its backward: moving rows between token order and expert order.

One program computes an output element, in the order of the choices, so no atomics are needed. All four are bound by
memory: a program moves a tile of whole vectors, and neighbouring programs share the rows that they read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, ceil_div, dense, power_of_two
from .variants import TYPE_NAMES, Variant, signature

_MOVED_ROWS = 16
_SUMMED_ROWS = 8  # a tile of float32 sums is in registers beside the tiles that are moved
_MAX_COLUMNS = 256
_OPTIONS = {"num_warps": 4, "num_stages": 1, **FUSED}


@triton.jit(do_not_specialize=["R"])
def _permute(x, choice_of_row, rows, R, D, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    choice = tl.load(choice_of_row + row, mask=row < R, other=-1)
    token = (choice // K).to(tl.int64)
    inside = column[None, :] < D
    tile = tl.load(x + token[:, None] * D + column[None, :], mask=(choice[:, None] >= 0) & inside, other=0.0)
    tl.store(rows + row.to(tl.int64)[:, None] * D + column[None, :], tile, mask=(row[:, None] < R) & inside)


@triton.jit(do_not_specialize=["T"])
def _gather_sum(
    rows, gates, row_of_choice, y, T, D, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(K):
        choice = token.to(tl.int64) * K + k
        row = tl.load(row_of_choice + choice, mask=token < T, other=-1).to(tl.int64)
        kept = row >= 0
        tile = tl.load(
            rows + row[:, None] * D + column[None, :], mask=kept[:, None] & (column[None, :] < D), other=0.0
        ).to(tl.float32)
        if gates is not None:
            tile = tile * tl.load(gates + choice, mask=kept, other=0.0)[:, None]
        total += tile
    place = y + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(token[:, None] < T) & (column[None, :] < D))


@triton.jit(do_not_specialize=["R", "E"])
def _combine_backward(
    dy, rows, gates, row_of_choice, offsets, d_rows, d_gates, R, D, E,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program processes BLOCK_R choices: it writes the rows of these choices, and of the rows with the same numbers
    as the choices those past the last one in use, which no choice has."""
    choice = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = choice < R
    row = tl.load(row_of_choice + choice, mask=inside, other=-1).to(tl.int64)
    kept = row >= 0
    gate = tl.load(gates + choice, mask=kept, other=0.0)
    token = (choice // K).to(tl.int64)
    unused = inside & (choice >= tl.load(offsets + E))
    products = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D))[None, :]
        here = kept[:, None] & (column < D)
        gradient = tl.load(dy + token[:, None] * D + column, mask=here, other=0.0).to(tl.float32)
        products += gradient * tl.load(rows + row[:, None] * D + column, mask=here, other=0.0).to(tl.float32)
        tl.store(d_rows + row[:, None] * D + column, (gate[:, None] * gradient).to(d_rows.dtype.element_ty), mask=here)
        nothing = tl.zeros([BLOCK_R, BLOCK_D], d_rows.dtype.element_ty)
        tl.store(d_rows + choice.to(tl.int64)[:, None] * D + column, nothing, mask=unused[:, None] & (column < D))
    tl.store(d_gates + choice, tl.sum(products, axis=1), mask=inside)


def _columns(width: int) -> int:
    """BLOCK_D: a power of two, of 16 to 256 columns."""
    return min(_MAX_COLUMNS, max(16, power_of_two(width)))


def _grid(num_rows: int, block_rows: int, width: int) -> tuple[int, int]:
    return ceil_div(num_rows, block_rows), ceil_div(width, _columns(width))


def permute(x, offsets, choice_of_row, row_of_choice) -> Tensor:
    """[R, D]: every row's token, 0 in empty rows."""
    x, choice_of_row = dense(x, choice_of_row)
    width, num_rows = x.shape[1], choice_of_row.numel()
    rows = x.new_empty(num_rows, width)
    if rows.numel():
        with torch.cuda.device_of(x):
            _permute[_grid(num_rows, _MOVED_ROWS, width)](
                x, choice_of_row, rows, num_rows, width,
                K=row_of_choice.shape[1], BLOCK_R=_MOVED_ROWS, BLOCK_D=_columns(width), **_OPTIONS,
            )  # fmt: skip
    return rows


def gather_sum(rows, row_of_choice) -> Tensor:
    """[T, D]: the sum of every token's rows; the backward of ``permute``."""
    return _weighted_sum(rows, None, row_of_choice)


def combine(rows, gates, offsets, choice_of_row, row_of_choice) -> Tensor:
    return _weighted_sum(rows, gates, row_of_choice)


def _weighted_sum(rows: Tensor, gates: Tensor | None, row_of_choice: Tensor) -> Tensor:
    rows, gates, row_of_choice = dense(rows, gates, row_of_choice)
    (num_tokens, k), width = row_of_choice.shape, rows.shape[1]
    y = rows.new_empty(num_tokens, width)
    if y.numel():
        with torch.cuda.device_of(rows):
            _gather_sum[_grid(num_tokens, _SUMMED_ROWS, width)](
                rows, gates, row_of_choice, y, num_tokens, width,
                K=k, BLOCK_T=_SUMMED_ROWS, BLOCK_D=_columns(width), **_OPTIONS,
            )  # fmt: skip
    return y


def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice) -> tuple[Tensor, Tensor]:
    dy, rows, gates, offsets, row_of_choice = dense(dy, rows, gates, offsets, row_of_choice)
    num_rows, width = rows.shape
    d_rows, d_gates = torch.empty_like(rows), torch.empty_like(gates)
    if num_rows:
        with torch.cuda.device_of(rows):
            _combine_backward[(ceil_div(num_rows, _SUMMED_ROWS),)](
                dy, rows, gates, row_of_choice, offsets, d_rows, d_gates, num_rows, width, offsets.numel() - 1,
                K=row_of_choice.shape[1], BLOCK_R=_SUMMED_ROWS, BLOCK_D=_columns(width), **_OPTIONS,
            )  # fmt: skip
    return d_rows, d_gates


def variants(arch: int) -> Iterator[Variant]:
    """Every storage type at a width that is a multiple of 16, and one width that is not; two choices per token."""
    shared = dict.fromkeys(("choice_of_row", "row_of_choice", "offsets"), "*i32") | dict.fromkeys("RTE", "i32")
    shared |= {"gates": "*fp32", "d_gates": "*fp32"}
    stages = (
        ("permute", _permute, {"BLOCK_R": _MOVED_ROWS}),
        ("combine", _gather_sum, {"BLOCK_T": _SUMMED_ROWS}),
        ("gather_sum", _gather_sum, {"BLOCK_T": _SUMMED_ROWS, "gates": None}),
        ("combine_backward", _combine_backward, {"BLOCK_R": _SUMMED_ROWS}),
    )
    for dtype, width in (*((name, "i32:16") for name in TYPE_NAMES.values()), ("bf16", "i32")):
        types = shared | dict.fromkeys(("x", "rows", "y", "dy", "d_rows"), f"*{dtype}") | {"D": width}
        for stage, kernel, sizes in stages:
            constants = {"K": 2, "BLOCK_D": _MAX_COLUMNS, **sizes}
            name = f"{stage} {dtype}" + ("" if width == "i32:16" else ", odd width")
            yield Variant(name, kernel, signature(kernel, types, constants), constants, _OPTIONS)
