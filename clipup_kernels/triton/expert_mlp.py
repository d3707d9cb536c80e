"""The fused expert MLP, forward: three launches.

    project_in     z = x W_in^T + b_in, rows gathered from x as they are loaded; a = act(z) in the epilogue.
                   Gated experts: both pre-activations from one pass over the rows, a = act(z_gate) * z_in.
    project_rows   a W_out^T + b_out                                                          (grouped_linear.py)
    combine        y = the gated sum of a token's rows                                        (rows.py)

z is rounded to the storage type before the activation even if it is not kept, so that training and inference compute
the same function and ``project_in`` gives bitwise the same a. In inference z is not written.

``dense_mlp`` has no kernels here: one MLP needs no routing and no gather, and torch's linear layers compute it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import glu
from ..types import ACTIVATIONS
from . import configs, rows
from .activations import activate
from .grouped_gemm import (
    add_bias,
    describe,
    find_tile,
    groups,
    max_tiles,
    multiply,
    multiply_pair,
    operand,
    place,
    quarters,
    suited,
)
from .grouped_linear import project_rows
from .launch import ceil_div, dense, stacked
from .variants import Variant


@triton.jit
def _finish_in(
    total, gate_total, bias, gate_bias, z, a, expert, first, end, first_column, plane, columns,
    STORAGE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of ``_project_in`` for some columns of a tile: z and a from the sums [M, N]."""
    corner, target, inside = place(first, end, first_column, columns, EVEN_COLUMNS, BLOCK_M, BLOCK_N)
    column = first_column + tl.arange(0, BLOCK_N)
    own_z = add_bias(total, bias, expert, column, columns).to(STORAGE)
    if z is not None:
        tl.store(z + corner + target, own_z, mask=inside)
    if gate_total is None:
        activated = activate(own_z.to(tl.float32), ACTIVATION)
    else:
        gate_z = add_bias(gate_total, gate_bias, expert, column, columns).to(STORAGE)
        if z is not None:
            tl.store(z + plane + corner + target, gate_z, mask=inside)
        activated = activate(gate_z.to(tl.float32), ACTIVATION) * own_z.to(tl.float32)
    if a is not None:
        tl.store(a + corner + target, activated.to(STORAGE), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "top_k"])
def _project_in(
    x, weight, bias, gate_weight, gate_bias, offsets, choice_of_row, z, a,
    num_rows, num_experts, top_k, depth, columns, stride,
    ACTIVATION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    expert, first, end = find_tile(offsets, tile // column_tiles, num_rows, num_experts, BLOCK_M, GROUPS)
    row = first + tl.arange(0, BLOCK_M)
    first_column = (tile % column_tiles) * BLOCK_N
    plane = num_rows.to(tl.int64) * columns  # distance from the pre-activations of W_in to those of W_gate
    if (first < end) & (expert < num_experts):
        STORAGE: tl.constexpr = x.dtype.element_ty
        # Surplus rows compute token 0 and are not stored.
        left = x + (tl.load(choice_of_row + row, mask=row < end, other=0) // top_k).to(tl.int64) * depth
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if gate_weight is None:
            total = multiply(
                total, left, weight, expert, stride, first_column, depth, columns,
                False, DESCRIPTORS, EVEN_DEPTH, EVEN_COLUMNS, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if BLOCK_N < 128:
                _finish_in(
                    total, None, bias, None, z, a, expert, first, end, first_column, plane, columns,
                    STORAGE, ACTIVATION, EVEN_COLUMNS, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            else:
                parts = quarters(total, BLOCK_M, BLOCK_N)
                for part in tl.static_range(4):
                    _finish_in(
                        parts[part], None, bias, None, z, a, expert, first, end, first_column + part * (BLOCK_N // 4),
                        plane, columns, STORAGE, ACTIVATION, EVEN_COLUMNS, BLOCK_M, BLOCK_N // 4,
                    )  # fmt: skip
        else:
            gate_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total, gate_total = multiply_pair(
                total, gate_total, left, weight, gate_weight, expert, stride, first_column, depth, columns,
                DESCRIPTORS, EVEN_DEPTH, EVEN_COLUMNS, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _finish_in(
                total, gate_total, bias, gate_bias, z, a, expert, first, end, first_column, plane, columns,
                STORAGE, ACTIVATION, EVEN_COLUMNS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif z is not None:
        column = first_column + tl.arange(0, BLOCK_N)
        target = z + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < end)[:, None] & (column < columns)[None, :]
        nothing = tl.zeros([BLOCK_M, BLOCK_N], z.dtype.element_ty)
        tl.store(target, nothing, mask=inside)
        if gate_weight is not None:
            tl.store(target + plane, nothing, mask=inside)


def project_in(
    x, offsets, choice_of_row, top_k, weight, bias, gate_weight, gate_bias, activation, *, keep_z: bool, keep_a: bool,
    config: configs.Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """z [R, H] (gated: [2, R, H], W_in's first), 0 past ``offsets[E]``, and a [R, H], unwritten there; each or None."""
    x, offsets, choice_of_row, bias, gate_bias = dense(x, offsets, choice_of_row, bias, gate_bias)
    (weight, gate_weight), stride = stacked(weight, gate_weight)
    num_experts, columns, depth = weight.shape
    num_rows = len(choice_of_row)
    shape = (num_rows, columns) if gate_weight is None else (2, num_rows, columns)
    z = x.new_empty(shape) if keep_z else None
    a = x.new_empty(num_rows, columns) if keep_a else None
    if num_rows == 0:
        return z, a
    kernel = "project_in" if gate_weight is None else "project_in_gated"
    config = config or configs.choose(kernel, x.device, x.dtype, num_rows, num_experts, depth, columns)
    config = suited(config, weight, gate_weight)
    tiles = max_tiles(num_rows, num_experts, config.block_m) * ceil_div(columns, config.block_n)
    with torch.cuda.device_of(x):
        _project_in[(tiles,)](
            x, operand(weight, config), bias, operand(gate_weight, config), gate_bias, offsets, choice_of_row, z, a,
            num_rows, num_experts, top_k, depth, columns, stride,
            ACTIVATION=activation, DESCRIPTORS=config.descriptors, **config.even(depth, columns),
            PRECISION=configs.precision(x.dtype), GROUPS=groups(num_experts), **config.constants, **config.options,
        )  # fmt: skip
    return z, a


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, D], and z ([R, H], gated [2, R, H]) or a tensor of 0 elements if not ``keep_z``."""
    z, a = project_in(
        x, offsets, choice_of_row, row_of_choice.shape[1], in_weight, in_bias, gate_weight, gate_bias, activation,
        keep_z=keep_z, keep_a=True,
    )  # fmt: skip
    out = project_rows(a, out_weight, out_bias, offsets)
    y = rows.combine(out, gates, offsets, choice_of_row, row_of_choice)
    return y, z if keep_z else x.new_empty(0)


def variants(arch: int) -> Iterator[Variant]:
    """``project_in`` with every tile and type, and with every activation.

    Forms without a bias, without z or without a do less work and are not listed.
    """
    pointers = ("x", "weight", "bias", "gate_weight", "gate_bias", "z", "a")
    for case in configs.cases(arch, "project_in"):
        form = dict(gate_weight=None, gate_bias=None)
        for activation in ACTIVATIONS if case.is_main else ("gelu",):
            yield describe(_project_in, activation, pointers, form | {"ACTIVATION": activation}, case)
        if case.is_main:
            yield describe(_project_in, "inference", pointers, form | {"ACTIVATION": "gelu", "z": None}, case)
    for case in configs.cases(arch, "project_in_gated"):
        for activation in ACTIVATIONS if case.is_main else ("silu",):
            yield describe(_project_in, activation, pointers, dict(ACTIVATION=activation), case)


expert_glu_forward = glu.forward_of(expert_mlp_forward)
