"""Gradients of the experts' weights and biases: sums over each expert's rows of the outer product of two rows.

``dW = left^T right``, ``db = sum of left's rows``, by the blocks of the first columns. A block computes a tile
of one expert's weight and loops over all of the expert's rows: every sum has a fixed order, without atomics and without
a split along the rows. With 8 experts of 768/3072 there are 576 tiles of 128 x 256 for one weight; the gradients of
both in one launch have 1,152, 8.7 waves of 132 multiprocessors, where two launches take two waves of 4.4.

Either operand may be in token order: a row is then looked up through its choice, so that x and dy need not be permuted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .grouped_gemm import describe, product
from .launch import ceil_div, dense
from .variants import Variant


@triton.jit
def _add_outer(
    total, left, right, choice_of_row, start, end, left_first, right_first, left_columns, right_columns,
    TOP_K: tl.constexpr, FULL: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN_LEFT: tl.constexpr, EVEN_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of ``_sum_of_outer``: the sum with some rows added. FULL: all of them are below ``end``."""
    row = start + tl.arange(0, BLOCK_K)
    mine = row < end
    left_row = row
    right_row = row
    if GATHER_LEFT or GATHER_RIGHT:
        if FULL:
            choice = tl.load(choice_of_row + row)
        else:
            choice = tl.load(choice_of_row + row, mask=mine, other=0)
        if GATHER_LEFT:
            left_row = choice // TOP_K
        if GATHER_RIGHT:
            right_row = choice // TOP_K
    left_column = left_first + tl.arange(0, BLOCK_M)
    right_column = right_first + tl.arange(0, BLOCK_N)
    lhs = _load(left, left_row, mine, left_column, left_columns, FULL, EVEN_LEFT)
    rhs = _load(right, right_row, mine, right_column, right_columns, FULL, EVEN_RIGHT)
    return tl.dot(tl.trans(lhs), rhs, total, input_precision=PRECISION)


@triton.jit
def _load(rows, row, mine, column, columns, FULL: tl.constexpr, EVEN: tl.constexpr):
    """[K, N]: columns of some rows, 0 in rows that are not ``mine`` and past the last column."""
    pointers = rows + row.to(tl.int64)[:, None] * columns + column[None, :]
    if FULL and EVEN:
        values = tl.load(pointers)
    elif EVEN:
        values = tl.load(pointers, mask=mine[:, None], other=0.0)
    elif FULL:
        values = tl.load(pointers, mask=(column < columns)[None, :], other=0.0)
    else:
        values = tl.load(pointers, mask=mine[:, None] & (column < columns)[None, :], other=0.0)
    return values


@triton.jit
def _sum_of_outer(
    left, right, choice_of_row, begin, end, left_first, right_first, left_columns, right_columns,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN_LEFT: tl.constexpr, EVEN_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``left^T right`` [M, N] over rows ``begin:end``.

    A gathered operand has a row per token, found through the row's choice. Only the last step masks rows.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    full_end = begin + (end - begin) // BLOCK_K * BLOCK_K
    for start in range(begin, full_end, BLOCK_K):
        total = _add_outer(
            total, left, right, choice_of_row, start, end, left_first, right_first, left_columns, right_columns,
            TOP_K, True, GATHER_LEFT, GATHER_RIGHT, EVEN_LEFT, EVEN_RIGHT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if full_end < end:
        total = _add_outer(
            total, left, right, choice_of_row, full_end, end, left_first, right_first, left_columns, right_columns,
            TOP_K, False, GATHER_LEFT, GATHER_RIGHT, EVEN_LEFT, EVEN_RIGHT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return total


@triton.jit
def _sum_of_rows(
    left, gates, choice_of_row, begin, end, first, columns,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left's rows ``begin:end`` summed [M], by gates if given.

    ``_sum_of_outer`` reads the same rows, but must not sum them too: for rows that both a product and another operation
    read, Triton (3.6 and 3.9) reserves a buffer too few on architecture 90, and loads the next rows into one that the
    product still reads (triton-lang/triton, issue 6691).
    """
    total = tl.zeros([BLOCK_M], tl.float32)
    column = first + tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_K, num_stages=3):
        row = start + tl.arange(0, BLOCK_K)
        mine = row < end
        own = row
        if GATHER or gates is not None:
            choice = tl.load(choice_of_row + row, mask=mine, other=0)
            if GATHER:
                own = choice // TOP_K
        terms = _load(left, own, mine, column, columns, False, EVEN).to(tl.float32)
        if gates is not None:
            terms = product(terms, tl.load(gates + choice, mask=mine, other=0.0)[:, None])
        total += tl.sum(terms, 0)
    return total


@triton.jit
def _gradient_tile(
    tile, left, right, gates, offsets, choice_of_row, d_weight, d_bias, left_columns, right_columns,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN_LEFT: tl.constexpr, EVEN_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    left_tiles = tl.cdiv(left_columns, BLOCK_M)
    right_tiles = tl.cdiv(right_columns, BLOCK_N)
    expert = tile // (left_tiles * right_tiles)
    left_first = tile // right_tiles % left_tiles * BLOCK_M
    right_first = tile % right_tiles * BLOCK_N
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    left_column = left_first + tl.arange(0, BLOCK_M)
    right_column = right_first + tl.arange(0, BLOCK_N)
    if d_bias is not None:
        if right_first == 0:
            bias = _sum_of_rows(
                left, gates, choice_of_row, begin, end, left_first, left_columns,
                TOP_K, GATHER_LEFT, EVEN_LEFT, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            own_bias = d_bias + expert.to(tl.int64) * left_columns + left_column
            tl.store(own_bias, bias.to(d_bias.dtype.element_ty), mask=left_column < left_columns)
    total = _sum_of_outer(
        left, right, choice_of_row, begin, end, left_first, right_first, left_columns, right_columns,
        TOP_K, GATHER_LEFT, GATHER_RIGHT, EVEN_LEFT, EVEN_RIGHT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    target = d_weight + expert.to(tl.int64) * left_columns * right_columns
    target += left_column[:, None] * right_columns + right_column[None, :]
    inside = (left_column < left_columns)[:, None] & (right_column < right_columns)[None, :]
    tl.store(target, total.to(d_weight.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient(
    left, right, gates, offsets, choice_of_row, d_weight, d_bias, left_columns, right_columns,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN_LEFT: tl.constexpr, EVEN_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _gradient_tile(
        tl.program_id(0), left, right, gates, offsets, choice_of_row, d_weight, d_bias, left_columns, right_columns,
        TOP_K, GATHER_LEFT, GATHER_RIGHT, EVEN_LEFT, EVEN_RIGHT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _expert_gradients(
    dz, x, dy, a, gates, offsets, choice_of_row, d_in_weight, d_in_bias, d_gate_weight, d_gate_bias, d_out_weight,
    d_out_bias, num_rows, num_experts, width, hidden,
    TOP_K: tl.constexpr, EVEN_SIZES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    in_tiles = num_experts * tl.cdiv(hidden, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    planes = 1 if d_gate_weight is None else 2
    if tile < planes * in_tiles:
        own_dz = dz
        own_weight = d_in_weight
        own_bias = d_in_bias
        # Computed for plain experts too: with the same code here and below, the compiler merges the two and reserves
        # shared memory for both.
        is_gate = tile >= in_tiles
        if d_gate_weight is not None:
            own_dz += tl.where(is_gate, num_rows, 0).to(tl.int64) * hidden
            own_weight = tl.where(is_gate, d_gate_weight, d_in_weight)
            if d_in_bias is not None:
                own_bias = tl.where(is_gate, d_gate_bias, d_in_bias)
        _gradient_tile(
            tile % in_tiles, own_dz, x, None, offsets, choice_of_row, own_weight, own_bias, hidden, width, TOP_K,
            False, True, EVEN_SIZES, EVEN_SIZES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gradient_tile(
            tile - planes * in_tiles, dy, a, gates, offsets, choice_of_row, d_out_weight, d_out_bias, width, hidden,
            TOP_K, True, False, EVEN_SIZES, EVEN_SIZES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def weight_gradient(
    left: Tensor, right: Tensor, offsets: Tensor, *, need_bias: bool, choice_of_row: Tensor | None = None,
    top_k: int = 1, gather_left: bool = False, gather_right: bool = False, gates: Tensor | None = None,
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``left^T right`` [E, M, N] over each expert's rows, and the sum of left's rows [E, M] or None.

    Args:
        left: [R, M], or [T, M] with ``gather_left``. right: [R, N], or [T, N] with ``gather_right``.
        choice_of_row: [R] int32, for gathered operands: row r belongs to token ``choice_of_row[r] // top_k``.
        gates: [T, K] float32: weights of left's rows in the bias gradient, for a gathered left.
        config: instead of the table's.
    """
    left, right, offsets, choice_of_row, gates = dense(left, right, offsets, choice_of_row, gates)
    num_experts, num_left, num_right = len(offsets) - 1, left.shape[1], right.shape[1]
    num_rows = len(left if choice_of_row is None else choice_of_row)
    make = left.new_empty if num_rows else left.new_zeros
    d_weight = make(num_experts, num_left, num_right)
    d_bias = make(num_experts, num_left) if need_bias else None
    if num_rows == 0:
        return d_weight, d_bias
    if num_right == 0 and need_bias:  # a tile sums left's rows beside its product
        _, d_bias = weight_gradient(
            left, right.new_zeros(len(right), 1), offsets, need_bias=True, choice_of_row=choice_of_row, top_k=top_k,
            gather_left=gather_left, gather_right=gather_right, gates=gates,
        )  # fmt: skip
        return d_weight, d_bias
    config = config or configs.choose(
        "weight_gradient", left.device, left.dtype, num_rows, num_experts, num_left, num_right
    )
    tiles = num_experts * ceil_div(num_left, config.block_m) * ceil_div(num_right, config.block_n)
    with torch.cuda.device_of(left):
        _weight_gradient[(tiles,)](
            left, right, gates, offsets, choice_of_row, d_weight, d_bias, num_left, num_right,
            TOP_K=top_k, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right,
            EVEN_LEFT=num_left % config.block_m == 0, EVEN_RIGHT=num_right % config.block_n == 0,
            PRECISION=configs.precision(left.dtype), **config.constants,
            **(_staged(config) if gather_left or gather_right else config).options,
        )  # fmt: skip
    return d_weight, d_bias


def expert_gradients(
    dz: Tensor, x: Tensor, dy: Tensor, a: Tensor, gates: Tensor, offsets: Tensor, choice_of_row: Tensor, *,
    in_bias: bool, out_bias: bool, config: configs.Config | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of in_weight, in_bias, out_weight, out_bias, gate_weight and gate_bias in one launch; None for those
    that an expert lacks.

    Args:
        dz: [R, H], or [2, R, H] for gated experts. x, dy: [T, D]. a: [R, H], already multiplied by the gates, which
            are [T, K] and scale dy in out_weight's bias.
        in_bias: whether in_weight, and gate_weight too, have a bias. out_bias: whether out_weight has.
        config: instead of the table's.
    """
    dz, x, dy, a, gates, offsets, choice_of_row = dense(dz, x, dy, a, gates, offsets, choice_of_row)
    num_experts, width, (num_rows, hidden) = len(offsets) - 1, x.shape[1], a.shape
    planes = 1 if dz.dim() == 2 else 2
    make = x.new_empty if num_rows else x.new_zeros
    in_weights = [make(num_experts, hidden, width) for _ in range(planes)]
    in_biases = [make(num_experts, hidden) if in_bias else None for _ in range(planes)]
    d_gate_weight, d_gate_bias = (in_weights[1], in_biases[1]) if planes == 2 else (None, None)
    d_out_weight = make(num_experts, width, hidden)
    d_out_bias = make(num_experts, width) if out_bias else None
    gradients = [in_weights[0], in_biases[0], d_out_weight, d_out_bias, d_gate_weight, d_gate_bias]
    if num_rows == 0:
        return gradients
    config = config or configs.choose("expert_gradients", x.device, x.dtype, num_rows, num_experts, hidden, width)
    in_tiles, out_tiles = (
        num_experts * ceil_div(left, config.block_m) * ceil_div(right, config.block_n)
        for left, right in ((hidden, width), (width, hidden))
    )
    block = max(config.block_m, config.block_n)
    with torch.cuda.device_of(x):
        _expert_gradients[(planes * in_tiles + out_tiles,)](
            dz, x, dy, a, gates, offsets, choice_of_row,
            in_weights[0], in_biases[0], d_gate_weight, d_gate_bias,
            d_out_weight, d_out_bias, num_rows, num_experts, width, hidden, TOP_K=gates.shape[1],
            EVEN_SIZES=width % block == 0 and hidden % block == 0, PRECISION=configs.precision(x.dtype),
            **config.constants, **_staged(config).options,
        )  # fmt: skip
    return gradients


def _staged(config: configs.Config) -> configs.Config:
    """The compiler halves the stages of loads with loaded addresses; this asks for twice as many."""
    return config._replace(num_stages=2 * config.num_stages - 1)


def variants(arch: int) -> Iterator[Variant]:
    """``weight_gradient`` with every tile and type, for both sides of the experts and for ``grouped_linear``."""
    pointers = ("left", "right", "d_weight", "d_bias")
    for case in configs.cases(arch, "expert_gradients"):
        case = case._replace(config=_staged(case.config))
        storage = ("dz", "x", "dy", "a", "d_in_weight", "d_in_bias", "d_out_weight", "d_out_bias")
        plain = dict(d_gate_weight=None, d_gate_bias=None, TOP_K=2)
        yield describe(_expert_gradients, "plain", storage, plain, case)
        if case.is_main:
            gates = ("d_gate_weight", "d_gate_bias")
            yield describe(_expert_gradients, "gated", storage + gates, dict(TOP_K=2), case)
    for case in configs.cases(arch, "weight_gradient"):
        staged = case._replace(config=_staged(case.config))
        in_side = dict(GATHER_LEFT=False, GATHER_RIGHT=True, gates=None, TOP_K=2)
        yield describe(_weight_gradient, "in", pointers, in_side, staged)
        out_side = dict(GATHER_LEFT=True, GATHER_RIGHT=False, TOP_K=2)
        yield describe(_weight_gradient, "out", pointers, out_side, staged)
        if case.is_main:
            unfused = dict(GATHER_LEFT=False, GATHER_RIGHT=False, gates=None, choice_of_row=None, TOP_K=1)
            yield describe(_weight_gradient, "unfused", pointers, unfused, case)
