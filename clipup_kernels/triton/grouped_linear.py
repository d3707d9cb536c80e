"""Grouped products of rows in expert order: ``grouped_linear``, and the products that the fused op shares with it.

``project_rows`` is ``rows W^T + b``, or ``rows W``: the second projection of the experts, and the gradient of a
product's rows. A block computes a whole tile of the output, so every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .grouped_gemm import (
    add_bias,
    describe,
    find_tile,
    groups,
    max_tiles,
    multiply,
    operand,
    place,
    suited,
)
from .launch import ceil_div, dense, stacked
from .variants import Variant
from .weight_gradient import weight_gradient


@triton.jit
def _first_terms(rows, first, end, depth, BLOCK_M: tl.constexpr):
    """``left`` of ``multiply`` for rows from ``first`` on. Surplus rows are not stored: they repeat the first row."""
    row = first + tl.arange(0, BLOCK_M)
    return rows + tl.where(row < end, row, first).to(tl.int64) * depth


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _project_rows(
    rows, weight, other_rows, other_weight, bias, offsets, out, num_rows, num_experts, depth, columns, stride,
    TRANSPOSED: tl.constexpr, FILL_EMPTY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    expert, first, end = find_tile(offsets, tile // column_tiles, num_rows, num_experts, BLOCK_M, GROUPS)
    first_column = (tile % column_tiles) * BLOCK_N
    if (first < end) & (expert < num_experts):
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = multiply(
            total, _first_terms(rows, first, end, depth, BLOCK_M), weight, expert, stride, first_column, depth, columns,
            TRANSPOSED, DESCRIPTORS, EVEN_DEPTH, EVEN_COLUMNS, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if other_rows is not None:
            total = multiply(
                total, _first_terms(other_rows, first, end, depth, BLOCK_M), other_weight, expert, stride, first_column,
                depth, columns, TRANSPOSED, DESCRIPTORS, EVEN_DEPTH, EVEN_COLUMNS, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        total = add_bias(total, bias, expert, first_column + tl.arange(0, BLOCK_N), columns)
        corner, target, inside = place(first, end, first_column, columns, EVEN_COLUMNS, BLOCK_M, BLOCK_N)
        tl.store(out + corner + target, total.to(out.dtype.element_ty), mask=inside)
    if FILL_EMPTY:
        if expert == num_experts:
            corner, target, inside = place(first, end, first_column, columns, EVEN_COLUMNS, BLOCK_M, BLOCK_N)
            tl.store(out + corner + target, tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty), mask=inside)


def project_rows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, *, transposed: bool = False,
    fill_empty: bool = False, other: tuple[Tensor, Tensor] | None = None, config: configs.Config | None = None,
) -> Tensor:  # fmt: skip
    """[R, N]: each row [depth] times its expert's weight, ``rows W^T + b``.

    Args:
        weight: [E, N, depth], or [E, depth, N] if ``transposed`` (``rows W``).
        fill_empty: rows past ``offsets[E]`` become 0; otherwise they are not written.
        other: rows and weight of a second product, added to the first.
        config: instead of the table's.
    """
    other_rows, other_weight = other or (None, None)
    rows, bias, offsets, other_rows = dense(rows, bias, offsets, other_rows)
    (weight, other_weight), stride = stacked(weight, other_weight)
    num_experts, columns, depth = weight.mT.shape if transposed else weight.shape
    num_rows = rows.shape[0]
    out = rows.new_empty(num_rows, columns)
    if num_rows == 0:
        return out
    kernel = "project_rows_transposed" if transposed else "project_rows"
    config = config or configs.choose(kernel, rows.device, rows.dtype, num_rows, num_experts, depth, columns)
    config = suited(config, weight, other_weight, transposed=transposed)
    tiles = max_tiles(num_rows, num_experts, config.block_m) * ceil_div(columns, config.block_n)
    with torch.cuda.device_of(rows):
        _project_rows[(tiles,)](
            rows, operand(weight, config, transposed), other_rows, operand(other_weight, config, transposed), bias,
            offsets, out, num_rows, num_experts, depth, columns, stride,
            TRANSPOSED=transposed, FILL_EMPTY=fill_empty, DESCRIPTORS=config.descriptors, **config.even(depth, columns),
            PRECISION=configs.precision(rows.dtype), GROUPS=groups(num_experts), **config.constants, **config.options,
        )  # fmt: skip
    return out


def grouped_linear(rows, weight, bias, offsets) -> Tensor:
    """[R, N]: each row [K] times its expert's weight [E, N, K] plus its bias [E, N]; 0 past ``offsets[E]``."""
    return project_rows(rows, weight, bias, offsets, fill_empty=True)


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask) -> tuple[Tensor, ...]:
    """Gradients of rows, weight and bias; those not in ``output_mask`` have 0 elements."""
    need_rows, need_weight, need_bias = output_mask
    none = rows.new_empty(0)
    d_rows = project_rows(d_out, weight, None, offsets, transposed=True, fill_empty=True) if need_rows else none
    d_weight = d_bias = none
    if need_weight or need_bias:
        d_weight, d_bias = weight_gradient(d_out, rows, offsets, need_bias=need_bias)
    return d_rows, d_weight if need_weight else none.clone(), d_bias if need_bias else none.clone()


def variants(arch: int) -> Iterator[Variant]:
    """``project_rows`` with every tile and type, in all its forms."""
    pointers = ("rows", "weight", "other_rows", "other_weight", "bias", "out")
    single = dict(other_rows=None, other_weight=None)
    forward = dict(TRANSPOSED=False, FILL_EMPTY=True, **single)
    gradient = dict(TRANSPOSED=True, FILL_EMPTY=False, bias=None)
    for case in configs.cases(arch, "project_rows"):
        yield describe(_project_rows, "forward", pointers, forward, case)
        yield describe(_project_rows, "gradient", pointers, gradient, case, transposed=True)
        if case.is_main:
            unfused = dict(TRANSPOSED=True, FILL_EMPTY=True, bias=None, **single)
            yield describe(_project_rows, "unfused gradient", pointers, unfused, case)
