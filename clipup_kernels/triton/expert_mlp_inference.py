"""Both products of the fused expert MLP in one launch, for narrow models in inference (z is not kept).

    project_both   a W_out^T + b_out with a = act(x W_in^T + b_in), rows gathered from x: no z and no a in memory.
                   Gated experts: a = act(x W_gate^T + b_gate) * (x W_in^T + b_in).

A block computes a tile of rows: their x [M, D] and the sums [M, D] stay on the chip while it loops over the hidden
units. z and a are rounded to the storage type as in ``project_in`` and ``project_rows``, which this kernel replaces if
``configs.choose_both`` has a tile for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import ACTIVATIONS
from . import configs
from .activations import activate
from .grouped_gemm import add_bias, describe, find_tile, groups, max_tiles
from .launch import dense, stacked
from .variants import Variant


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    """The tile at ``pointers``, 0 outside; EVEN: all of it is inside."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _pre_activation(tokens, weight, bias, expert, unit, hidden, PRECISION: tl.constexpr):
    """z [M, N] of some hidden units in float32, once rounded, from tokens [M, D] and the units' weight [D, N]."""
    total = tl.dot(tokens, weight, input_precision=PRECISION)
    return add_bias(total, bias, expert, unit, hidden).to(tokens.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "top_k"])
def _project_both(
    x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, offsets, choice_of_row, out,
    num_rows, num_experts, top_k, width, hidden, in_stride, out_stride,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, HOIST: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, first, end = find_tile(offsets, tl.program_id(0), num_rows, num_experts, BLOCK_M, GROUPS)
    if first >= end or expert == num_experts:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    inside = column < width
    token = (
        tl.load(choice_of_row + row, mask=row < end, other=0) // top_k
    )  # surplus rows compute token 0 and are not stored
    tokens = _load(x + token.to(tl.int64)[:, None] * width + column[None, :], inside[None, :], EVEN)
    own_in = expert.to(tl.int64) * in_stride
    own_out = expert.to(tl.int64) * out_stride
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    # Hoisting costs registers, but on architecture 80 x would be staged inside the loop without it.
    for start in tl.range(0, hidden, BLOCK_N, disable_licm=not HOIST):
        unit = start + tl.arange(0, BLOCK_N)
        left = own_in + unit[None, :] * width + column[:, None]
        weight = _load(in_weight + left, inside[:, None], EVEN)
        z = _pre_activation(tokens, weight, in_bias, expert, unit, hidden, PRECISION)
        if gate_weight is None:
            a = activate(z, ACTIVATION)
        else:
            weight = _load(gate_weight + left, inside[:, None], EVEN)
            a = activate(_pre_activation(tokens, weight, gate_bias, expert, unit, hidden, PRECISION), ACTIVATION) * z
        right = own_out + column[None, :] * hidden + unit[:, None]
        weight = _load(out_weight + right, inside[None, :], EVEN)
        total = tl.dot(a.to(tokens.dtype), weight, total, input_precision=PRECISION)
    total = add_bias(total, out_bias, expert, column, width)
    target = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & inside[None, :])


def project_both(
    x, offsets, choice_of_row, top_k, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias, activation,
    config: configs.Config,
) -> Tensor:  # fmt: skip
    """[R, D]: ``project_rows`` of the a of ``project_in``, up to the order of sums; not written past ``offsets[E]``.

    Raises:
        ValueError: the config does not fit weights of these sizes.
    """
    x, offsets, choice_of_row, in_bias, out_bias, gate_bias = dense(
        x, offsets, choice_of_row, in_bias, out_bias, gate_bias
    )
    (in_weight, gate_weight), in_stride = stacked(in_weight, gate_weight)
    (out_weight,), out_stride = stacked(out_weight)
    num_experts, hidden, width = in_weight.shape
    if config.block_k < width or hidden % config.block_n:
        raise ValueError(
            f"the measured config {tuple(config)} is none of project_both for weights {list(in_weight.shape)}; delete "
            f"{configs.table_path()}"
        )
    num_rows = len(choice_of_row)
    out = x.new_empty(num_rows, width)
    if num_rows == 0:
        return out
    with torch.cuda.device_of(x):
        _project_both[(max_tiles(num_rows, num_experts, config.block_m),)](
            x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, offsets, choice_of_row, out,
            num_rows, num_experts, top_k, width, hidden, in_stride, out_stride,
            ACTIVATION=activation, EVEN=width == config.block_k, HOIST=configs.architecture(x.device) == 80,
            PRECISION=configs.precision(x.dtype), GROUPS=groups(num_experts), **config.constants, **config.options,
        )  # fmt: skip
    return out


def variants(arch: int) -> Iterator[Variant]:
    """``project_both`` with every tile and type, the usual one with every activation, and gated."""
    pointers = ("x", "in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias", "out")
    for kernel, form in {
        "project_both": dict(gate_weight=None, gate_bias=None, ACTIVATION="gelu"),
        "project_both_gated": dict(ACTIVATION="silu"),
    }.items():
        for case in configs.cases_both(arch, kernel):
            activations = ACTIVATIONS if case.is_main and kernel == "project_both" else (form["ACTIVATION"],)
            for activation in activations:
                name = activation if case.even else f"{activation} masked"
                constants = form | dict(ACTIVATION=activation, EVEN=case.even, HOIST=arch == 80)
                yield describe(_project_both, name, pointers, constants, case._replace(even=True))
