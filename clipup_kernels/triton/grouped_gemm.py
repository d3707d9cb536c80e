"""Shared by all grouped products: finding the expert of a tile, and a tile's sum over the terms.

Rows are sorted by expert, so a tile of rows belongs to one expert. The host knows R and E but not the number of rows
per expert: it launches the largest possible number of tiles, and a block finds its tile from ``offsets``. Experts are
processed one after another, so that an expert's weights stay in the second-level cache while its tiles are computed.
Rows past ``offsets[E]`` come last, as tiles of a group E without an expert.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .launch import power_of_two
from .variants import TYPE_NAMES, Variant, signature


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that R rows in E + 1 groups can take: every group may end with a tile of a single row."""
    return (num_rows + (num_experts + 1) * (block_m - 1)) // block_m


def operand(
    weight: Tensor | None, config: configs.Config, transposed: bool = False
) -> Tensor | TensorDescriptor | None:
    """The weights argument of ``multiply``: weights [E, N, K] ([E, K, N] if ``transposed``) of ``stacked`` or, if the
    config (of ``suited``) says so, a descriptor (TMA) of them as one matrix."""
    if weight is None or not config.descriptors:
        return weight
    block = [config.block_k, config.block_n] if transposed else [config.block_n, config.block_k]
    num_experts, rows, columns = weight.shape
    matrix = (num_experts - 1) * (weight.stride(0) // columns) + rows, columns
    return TensorDescriptor.from_tensor(weight.as_strided(matrix, (columns, 1)), block)


def suited(config: configs.Config, *weights: Tensor | None, transposed: bool = False) -> configs.Config:
    """The config, without descriptors if these weights do not allow any: they need memory and rows on multiples of 16
    bytes, and whole blocks of terms. One measured config serves weights wherever they lie."""
    if config.descriptors and not all(_describable(weight, config, transposed) for weight in weights):
        config = config._replace(descriptors=False)
    return config


def _describable(weight: Tensor | None, config: configs.Config, transposed: bool) -> bool:
    if weight is None:
        return True
    aligned = weight.numel() > 0 and weight.shape[2] * weight.itemsize % 16 == 0 and weight.data_ptr() % 16 == 0
    if not aligned or weight.stride(0) % weight.shape[2]:
        return False
    return weight.stride(0) < 1 << 31 and not (transposed and weight.shape[1] % config.block_k)


def groups(num_experts: int) -> int:
    """GROUPS of ``find_tile``: a power of two that holds the experts and the group of empty rows."""
    return power_of_two(num_experts + 1)


@triton.jit
def find_tile(offsets, tile, num_rows, num_experts, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Expert, first row and end of the expert's rows for a tile; E: the tile's rows are empty; 0, 0: no such tile."""
    group = tl.arange(0, GROUPS)
    start = tl.load(offsets + group, mask=group <= num_experts, other=0)
    stop = tl.load(offsets + group + 1, mask=group < num_experts, other=0)
    stop = tl.where(group == num_experts, num_rows, stop)
    tiles = tl.where(group <= num_experts, (stop - start + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_so_far = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_so_far <= tile).to(tl.int32), 0)
    mine = group == expert
    first_row = tl.sum(tl.where(mine, start + (tile - tiles_so_far + tiles) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(mine, stop, 0), 0)
    return expert, first_row, end


@triton.jit
def expert_of(row, offsets, num_experts, GROUPS: tl.constexpr):
    """The expert of each row [N] below ``offsets[E]``."""
    group = tl.arange(0, GROUPS)
    stop = tl.load(offsets + group + 1, mask=group < num_experts, other=2147483647)
    return tl.sum((stop[None, :] <= row[:, None]).to(tl.int32), 1)


@triton.jit
def _weight_start(weight, expert, stride, first_column, depth, TRANSPOSED: tl.constexpr):
    """Pointer to the first term of a tile's first column, in weights [columns, depth], or [depth, columns] if
    TRANSPOSED, of an expert every ``stride`` elements. It is a scalar, and places relative to it are int32: in the loop
    over the terms both take few registers."""
    own = weight + expert.to(tl.int64) * stride
    if TRANSPOSED:
        start = own + first_column
    else:
        start = own + first_column.to(tl.int64) * depth
    return start


@triton.jit
def product(a, b):
    """a * b, for a sum over threads.

    The compiler would fuse a plain product with the first addition. Two threads that exchange their products would then
    each round the other's and not their own: their sums differ in the last bit, and both store them at one address.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def _weight_places(
    depth, columns, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """[K, N] places of a step's terms relative to the first term of the first column."""
    term = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        places = term[:, None] * columns + column[None, :]
    else:
        places = column[None, :] * depth + term[:, None]
    return places


@triton.jit
def _load_rows(pointers, term, depth, EVEN_DEPTH: tl.constexpr):
    """[M, K]: one step's terms of the rows, 0 past the last term."""
    if EVEN_DEPTH:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(term < depth)[None, :], other=0.0)
    return rows


@triton.jit
def _load_weight(pointers, term, depth, column, columns, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """[K, N]: one step's terms of the columns, 0 past the last term and the last column."""
    if EVEN_DEPTH and EVEN_COLUMNS:
        weight = tl.load(pointers)
    else:
        weight = tl.load(pointers, mask=(term < depth)[:, None] & (column < columns)[None, :], other=0.0)
    return weight


@triton.jit
def _load_block(weight, expert, stride, start, first_column, depth, columns, TRANSPOSED: tl.constexpr):
    """[K, N]: ``_load_weight`` through a descriptor of all experts' weights; undefined past the last column."""
    if TRANSPOSED:
        block = weight.load([expert * (stride // columns) + start, first_column])
    else:
        block = tl.trans(weight.load([expert * (stride // depth) + first_column, start]))
    return block


@triton.jit
def multiply(
    total, left, weight, expert, stride, first_column, depth, columns,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``total`` [M, N] float32 plus rows times the expert's weight.

    ``left`` [M] points to a row's first term. ``stride``: elements from one expert's weight to the next.
    """
    term = tl.arange(0, BLOCK_K)
    column = first_column + tl.arange(0, BLOCK_N)
    left = left[:, None] + term[None, :]
    if not DESCRIPTORS:
        right = _weight_start(weight, expert, stride, first_column, depth, TRANSPOSED)
        places = _weight_places(depth, columns, TRANSPOSED, BLOCK_N, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        rows = _load_rows(left, start + term, depth, EVEN_DEPTH)
        left += BLOCK_K
        if DESCRIPTORS:
            own = _load_block(weight, expert, stride, start, first_column, depth, columns, TRANSPOSED)
        else:
            own = _load_weight(right + places, start + term, depth, column, columns, EVEN_DEPTH, EVEN_COLUMNS)
            if TRANSPOSED:
                right += BLOCK_K * columns
            else:
                right += BLOCK_K
        total = tl.dot(rows, own, total, input_precision=PRECISION)
    return total


@triton.jit
def multiply_pair(
    total, other_total, left, weight, other_weight, expert, stride, first_column, depth, columns,
    DESCRIPTORS: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``multiply`` of the same rows by two weights [columns, depth]; the rows are read once."""
    term = tl.arange(0, BLOCK_K)
    column = first_column + tl.arange(0, BLOCK_N)
    left = left[:, None] + term[None, :]
    if not DESCRIPTORS:
        right = _weight_start(weight, expert, stride, first_column, depth, False)
        other_right = _weight_start(other_weight, expert, stride, first_column, depth, False)
        places = _weight_places(depth, columns, False, BLOCK_N, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        rows = _load_rows(left, start + term, depth, EVEN_DEPTH)
        left += BLOCK_K
        if DESCRIPTORS:
            own = _load_block(weight, expert, stride, start, first_column, depth, columns, False)
            other = _load_block(other_weight, expert, stride, start, first_column, depth, columns, False)
        else:
            own = _load_weight(right + places, start + term, depth, column, columns, EVEN_DEPTH, EVEN_COLUMNS)
            other = _load_weight(other_right + places, start + term, depth, column, columns, EVEN_DEPTH, EVEN_COLUMNS)
            right += BLOCK_K
            other_right += BLOCK_K
        total = tl.dot(rows, own, total, input_precision=PRECISION)
        other_total = tl.dot(rows, other, other_total, input_precision=PRECISION)
    return total, other_total


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half [M, N/2] of a tile [M, N]: a long epilogue processes parts one by one, to save
    registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The four quarters [M, N/4] of a tile [M, N]."""
    left, right = halves(tile, BLOCK_M, BLOCK_N)
    first, second = halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)
    return first, second, third, fourth


@triton.jit
def place(
    first, end, first_column, columns, EVEN_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Offset of a tile's first element in [rows, columns], relative offsets of its elements, and a mask of those
    inside."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < end - first)[:, None]
    if not EVEN_COLUMNS:
        inside = inside & (column < columns - first_column)[None, :]
    corner = first.to(tl.int64) * columns + first_column
    return corner, row[:, None] * columns + column[None, :], inside


@triton.jit
def add_bias(total, bias, expert, column, columns):
    """``total`` [M, N] plus the expert's bias [E, columns]; unchanged without a bias."""
    if bias is not None:
        own = tl.load(bias + expert.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
        total += own.to(tl.float32)[None, :]
    return total


_INT32_POINTERS = {"offsets", "choice_of_row"}
_FLOAT32_POINTERS = {"gates", "parts"}
_WIDTHS = {"depth", "columns", "left_columns", "right_columns", "width", "hidden", "stride"}
_WEIGHTS = {"weight", "other_weight", "gate_weight"}
_TENSOR_CORE_INSTRUCTION = {80: ("HMMA",), 90: ("HGMMA",), 100: ()}


def describe(
    kernel: Any, form: str, storage: tuple[str, ...], constants: dict[str, Any], case: configs.Case,
    transposed: bool = False,
) -> Variant:  # fmt: skip
    """The variant of a product's kernel that is launched in ``case``.

    Args:
        form: a name that distinguishes this specialization from the kernel's others.
        storage: the arguments that point to the storage type.
        constants: the constexprs that make up the form; those of the config are added.
        transposed: layout of weights that are loaded by descriptors.
    """
    names = kernel.arg_names
    pointer = "*" + TYPE_NAMES[case.dtype]
    types = {name: "i32:16" if case.even and name in _WIDTHS else "i32" for name in names}
    types |= {name: "*i32" for name in names if name in _INT32_POINTERS}
    types |= {name: "*fp32" for name in names if name in _FLOAT32_POINTERS}
    types |= dict.fromkeys(storage, pointer)
    block = case.config
    if block.descriptors:
        sizes = (block.block_k, block.block_n) if transposed else (block.block_n, block.block_k)
        descriptor = "tensordesc<{}[{}, {}]>".format(TYPE_NAMES[case.dtype], *sizes)
        types |= {name: descriptor for name in names if name in _WEIGHTS}
    shared = {"DESCRIPTORS": block.descriptors, "GROUPS": 16, **block.constants}
    shared |= {"PRECISION": "tf32" if case.kind == "tf32" else "ieee"}
    shared |= {name: case.even for name in names if name.startswith("EVEN_")}
    constants = {name: value for name, value in (shared | constants).items() if name in names}
    tile = f"{block.block_m}x{block.block_n}x{block.block_k} w{block.num_warps}" + ("" if case.even else " odd")
    tile += " descriptors" * block.descriptors
    instructions = _TENSOR_CORE_INSTRUCTION[case.arch] if case.kind == "half" else ()
    return Variant(
        f"{case.kernel} {form} {TYPE_NAMES[case.dtype]} {case.kind} {tile}",
        kernel,
        signature(kernel, types, constants),
        constants,
        block.options,
        instructions + (("UTMALDG",) if block.descriptors else ()),
        case.most_registers,
    )
