"""The fused expert MLP, backward. For row r with token t, expert e, gate g, and dout = dy_t:

    project_back      da = dout W_out, dout gathered from dy as it is loaded; its epilogue reads z and writes
                      dz = g da act'(z), g a (for dW_out), and partial sums of <a, da> per tile of columns
    gate_gradient     dgate = <a, da> + <dout, b_out>: the partial sums added in order
    expert_gradients  dW_out = sum of dout (g a)^T, dW_in = sum of dz x^T, the bias gradients in the same loops;
                      weight_gradient for one of them alone
    project_rows      dz W_in, for gated experts both products in one tile; gather_sum adds a token's rows to give dx

Gated experts, with a = act(z_gate) z_in: dz_in = g da act(z_gate), dz_gate = g da z_in act'(z_gate).
Only z is saved; without it, it is recomputed first. Rows past ``offsets[E]`` are neither read nor written.
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
from .activations import activate_with_slope
from .expert_mlp import project_in
from .grouped_gemm import (
    describe,
    expert_of,
    find_tile,
    groups,
    halves,
    max_tiles,
    multiply,
    operand,
    place,
    product,
    quarters,
    suited,
)
from .grouped_linear import project_rows
from .launch import FUSED, ceil_div, dense, power_of_two, stacked
from .variants import TYPE_NAMES, Variant, signature
from .weight_gradient import expert_gradients, weight_gradient


@triton.jit
def _finish_back(
    da, gate, z, dz, scaled_a, first, end, first_column, plane, columns,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of ``_project_back`` for some columns of a tile, da [M, N]; returns their partial sum of <a, da>
    [M]."""
    corner, target, inside = place(first, end, first_column, columns, EVEN_COLUMNS, BLOCK_M, BLOCK_N)
    storage = z.dtype.element_ty
    linear = tl.load(z + corner + target, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate_z = tl.load(z + plane + corner + target, mask=inside, other=0.0).to(tl.float32)
        activated, slope = activate_with_slope(gate_z, ACTIVATION)
        a = activated * linear
    else:
        a, slope = activate_with_slope(linear, ACTIVATION)
    if storage == tl.float32:
        d_gate = tl.sum(product(a, da), 1)  # both are 0 past the last column
    else:  # the sums of tensor cores leave a thread several columns, which it adds first
        d_gate = tl.sum(a * da, 1)
    if scaled_a is not None:
        tl.store(scaled_a + corner + target, (gate[:, None] * a).to(storage), mask=inside)
    if dz is not None:
        da *= gate[:, None]
        if GATED:
            tl.store(dz + plane + corner + target, (da * linear * slope).to(storage), mask=inside)
            tl.store(dz + corner + target, (da * activated).to(storage), mask=inside)
        else:
            tl.store(dz + corner + target, (da * slope).to(storage), mask=inside)
    return d_gate


@triton.jit(do_not_specialize=["num_rows", "num_experts", "top_k"])
def _project_back(
    dy, weight, z, gates, offsets, choice_of_row, dz, scaled_a, parts,
    num_rows, num_experts, top_k, depth, columns, stride,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    column_tile = tile % column_tiles
    expert, first, end = find_tile(offsets, tile // column_tiles, num_rows, num_experts, BLOCK_M, GROUPS)
    if (first < end) & (expert < num_experts):
        row = first + tl.arange(0, BLOCK_M)
        own = row < end
        first_column = column_tile * BLOCK_N
        plane = num_rows.to(tl.int64) * columns
        left = dy + (tl.load(choice_of_row + row, mask=own, other=0) // top_k).to(tl.int64) * depth
        da = multiply(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), left, weight, expert, stride, first_column, depth, columns,
            True, DESCRIPTORS, EVEN_DEPTH, EVEN_COLUMNS, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # Loaded again: kept through the product it would cost registers.
        gate = tl.load(gates + tl.load(choice_of_row + row, mask=own, other=-1), mask=own, other=0.0)
        if BLOCK_N < 128:
            d_gate = _finish_back(
                da, gate, z, dz, scaled_a, first, end, first_column, plane, columns,
                GATED, ACTIVATION, EVEN_COLUMNS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            # Eight parts, in a loop over the halves that is not unrolled: otherwise the compiler adds up <a, da> of all
            # parts at the end, keeps their terms until then and needs more than the 128 registers of two blocks.
            d_gate = tl.zeros([BLOCK_M], tl.float32)
            half, right_half = halves(da, BLOCK_M, BLOCK_N)
            for _ in tl.range(0, 2, num_stages=1, loop_unroll_factor=1):
                das = quarters(half, BLOCK_M, BLOCK_N // 2)
                for part in tl.static_range(4):
                    d_gate += _finish_back(
                        das[part], gate, z, dz, scaled_a, first, end, first_column + part * (BLOCK_N // 8), plane,
                        columns, GATED, ACTIVATION, EVEN_COLUMNS, BLOCK_M, BLOCK_N // 8,
                    )  # fmt: skip
                half = right_half
                first_column += BLOCK_N // 2
        if parts is not None:
            tl.store(parts + row.to(tl.int64) * column_tiles + column_tile, d_gate, mask=own)


def project_back(
    dy, gates, offsets, choice_of_row, out_weight, z, activation, *, need_dz: bool, need_a: bool, need_parts: bool,
    config: configs.Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz of z's shape, the gated a [R, H] and the partial sums of <a, da> [R, tiles of columns] float32, each or None.

    Not written past ``offsets[E]``.
    """
    dy, gates, offsets, choice_of_row, z = dense(dy, gates, offsets, choice_of_row, z)
    (out_weight,), stride = stacked(out_weight)
    num_experts, depth, columns = out_weight.shape
    num_rows, top_k = len(choice_of_row), gates.shape[1]
    config = config or configs.choose("project_back", dy.device, dy.dtype, num_rows, num_experts, depth, columns)
    config = suited(config, out_weight, transposed=True)
    column_tiles = ceil_div(columns, config.block_n)
    dz = torch.empty_like(z) if need_dz else None
    scaled_a = dy.new_empty(num_rows, columns) if need_a else None
    parts = gates.new_empty(num_rows, column_tiles) if need_parts else None
    tiles = max_tiles(num_rows, num_experts, config.block_m) * column_tiles
    if num_rows > 0:
        with torch.cuda.device_of(dy):
            _project_back[(tiles,)](
                dy, operand(out_weight, config, transposed=True), z, gates, offsets, choice_of_row, dz, scaled_a, parts,
                num_rows, num_experts, top_k, depth, columns, stride, GATED=z.dim() == 3, ACTIVATION=activation,
                DESCRIPTORS=config.descriptors, **config.even(depth, columns),
                PRECISION=configs.precision(dy.dtype), GROUPS=groups(num_experts),
                **config.constants, **config.options,
            )  # fmt: skip
    return dz, scaled_a, parts


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "top_k", "num_parts"])
def _gate_gradient(
    parts, dy, out_bias, offsets, row_of_choice, d_gates, num_tokens, num_experts, top_k, num_parts, width,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = token < num_tokens
    part = tl.arange(0, PARTS)
    for k in range(0, top_k):
        choice = token.to(tl.int64) * top_k + k
        row = tl.load(row_of_choice + choice, mask=real, other=-1)
        routed = row >= 0
        own_parts = parts + row.to(tl.int64)[:, None] * num_parts + part[None, :]
        total = tl.sum(tl.load(own_parts, mask=routed[:, None] & (part < num_parts)[None, :], other=0.0), 1)
        if out_bias is not None:
            expert = expert_of(row, offsets, num_experts, GROUPS).to(tl.int64)
            for start in range(0, width, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                mask = routed[:, None] & (column < width)[None, :]
                gradient = tl.load(dy + token.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
                bias = tl.load(out_bias + expert[:, None] * width + column[None, :], mask=mask, other=0.0)
                total += tl.sum(gradient.to(tl.float32) * bias.to(tl.float32), 1)
        tl.store(d_gates + choice, total, mask=real)


def gate_gradient(parts, dy, out_bias, offsets, row_of_choice) -> Tensor:
    """[T, K] float32: the sum of a row's partial sums [R, P] plus <dy_t, b_out>, 0 for pairs without a row."""
    dy, out_bias, offsets, row_of_choice = dense(dy, out_bias, offsets, row_of_choice)
    num_tokens, top_k = row_of_choice.shape
    num_experts, num_parts = len(offsets) - 1, parts.shape[1]
    d_gates = parts.new_empty(num_tokens, top_k)
    if num_tokens > 0:
        with torch.cuda.device_of(dy):
            _gate_gradient[(ceil_div(num_tokens, _BLOCK_T),)](
                parts, dy, out_bias, offsets, row_of_choice, d_gates, num_tokens, num_experts, top_k, num_parts,
                dy.shape[1], PARTS=power_of_two(num_parts), GROUPS=groups(num_experts),
                BLOCK_T=_BLOCK_T, BLOCK_D=_BLOCK_D, **_GATE_OPTIONS,
            )  # fmt: skip
    return d_gates


_BLOCK_T, _BLOCK_D = 16, 256
_GATE_OPTIONS = {"num_warps": 4, "num_stages": 3, **FUSED}


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias.

    ``output_mask`` selects them: x, gates, parameters of the input side, of the output side; the others, and those of
    absent parameters, have 0 elements. An empty ``z`` is recomputed.
    """
    need_x, need_gates, need_in, need_out = output_mask
    top_k = row_of_choice.shape[1]
    if z.numel() == 0:
        z, _ = project_in(
            x, offsets, choice_of_row, top_k, in_weight, in_bias, gate_weight, gate_bias, activation,
            keep_z=True, keep_a=False,
        )  # fmt: skip
    dz, scaled_a, parts = project_back(
        dy, gates, offsets, choice_of_row, out_weight, z, activation,
        need_dz=need_x or need_in, need_a=need_out, need_parts=need_gates,
    )  # fmt: skip
    d_gates = gate_gradient(parts, dy, out_bias, offsets, row_of_choice) if need_gates else gates.new_empty(0)
    d_out_weight = d_out_bias = d_in_weight = d_in_bias = d_gate_weight = d_gate_bias = dx = None
    same_biases = gate_weight is None or (in_bias is None) == (gate_bias is None)
    if need_in and need_out and same_biases and in_weight.numel() > 0:
        d_in_weight, d_in_bias, d_out_weight, d_out_bias, d_gate_weight, d_gate_bias = expert_gradients(
            dz, x, dy, scaled_a, gates, offsets, choice_of_row, in_bias=in_bias is not None,
            out_bias=out_bias is not None,
        )  # fmt: skip
        need_in = need_out = False
    if need_out:
        d_out_weight, d_out_bias = weight_gradient(
            dy, scaled_a, offsets, need_bias=out_bias is not None, choice_of_row=choice_of_row, top_k=top_k,
            gather_left=True, gates=gates,
        )  # fmt: skip
    dz_in, dz_gate = (dz, None) if gate_weight is None or dz is None else dz.unbind()

    def in_gradient(gradient: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight_gradient(
            gradient, x, offsets, need_bias=bias is not None, choice_of_row=choice_of_row, top_k=top_k,
            gather_right=True,
        )  # fmt: skip

    if need_in:
        d_in_weight, d_in_bias = in_gradient(dz_in, in_bias)
        if gate_weight is not None:
            d_gate_weight, d_gate_bias = in_gradient(dz_gate, gate_bias)
    if need_x:
        other = None if gate_weight is None else (dz_gate, gate_weight)
        dx = rows.gather_sum(project_rows(dz_in, in_weight, None, offsets, transposed=True, other=other), row_of_choice)

    gradients = (dx, d_gates, d_in_weight, d_in_bias, d_out_weight, d_out_bias, d_gate_weight, d_gate_bias)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def variants(arch: int) -> Iterator[Variant]:
    """``project_back`` with every tile and type, plain and gated, and with every activation; ``gate_gradient`` with
    every type."""
    pointers = ("dy", "weight", "z", "dz", "scaled_a")
    for case in configs.cases(arch, "project_back"):
        for gated, usual in ((False, "gelu"), (True, "silu")):
            for activation in ACTIVATIONS if case.is_main else (usual,):
                form = dict(GATED=gated, ACTIVATION=activation)
                label = f"gated {activation}" if gated else activation
                yield describe(_project_back, label, pointers, form, case, transposed=True)
    integers = ("num_tokens", "num_experts", "top_k", "num_parts", "width")
    for name in TYPE_NAMES.values():
        types = {"parts": "*fp32", "dy": f"*{name}", "out_bias": f"*{name}", "offsets": "*i32", "row_of_choice": "*i32"}
        types |= {"d_gates": "*fp32", **dict.fromkeys(integers, "i32"), "width": "i32:16"}
        constants = {"PARTS": 32, "GROUPS": 16, "BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D}
        yield Variant(
            f"gate_gradient {name}",
            _gate_gradient,
            signature(_gate_gradient, types, constants),
            constants,
            _GATE_OPTIONS,
        )


expert_glu_backward = glu.backward_of(expert_mlp_backward)
