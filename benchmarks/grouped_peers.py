"""The strong peers on a GPU: this project's routing and moving of rows around other projects' grouped products.

Both are what a careful user would write, so ``gpu_summary.py`` gives no verdict without them, and docs/gpu_kernels.md
says what follows if they are faster.

    grouped_mm_fused   torch's grouped products; bias and GELU, and their backward with the bias's gradient, in a launch
    quack              QuACK's products, which gather rows and have both in their epilogues
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from moe_layer import Weights
from torch import Tensor

import clipup_kernels as ck
from clipup_kernels.triton.activations import activate_with_slope

PARTS, BLOCK_R, BLOCK_H = 64, 8, 256


def routed(x: Tensor, w: Weights) -> tuple[ck.Gating, ck.Plan]:
    gating = ck.topk_gating(ck.router_logits(x, w.router.float()), w.top_k, renormalize=True)
    return gating, ck.dispatch(gating.expert_indices, w.router.shape[0])


def shares(gates: Tensor, experts: Tensor, like: Tensor, num_experts: int) -> Tensor:
    """[T, E]: every expert's gate for a token, 0 for those not chosen. Times biases: what these add to y."""
    return like.new_zeros(len(like), num_experts).scatter(1, experts.long(), gates.to(like.dtype))


@triton.jit
def _bias_gelu(
    hidden, bias, da, offsets, out, parts, H, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """``gelu(hidden + bias)``; with ``da`` the gradient of hidden, and its sums over a part of an expert's rows."""
    expert = tl.program_id(0) // PARTS
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    rows = tl.cdiv(end - first, PARTS)
    first += tl.program_id(0) % PARTS * rows
    end = tl.minimum(end, first + rows)
    own = tl.load(bias + expert * H + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = row.to(tl.int64)[:, None] * H + column[None, :]
        inside = (row < end)[:, None] & (column < H)[None, :]
        value, slope = activate_with_slope(
            tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32) + own[None, :], "gelu"
        )
        if da is not None:
            value = tl.load(da + place, mask=inside, other=0.0).to(tl.float32) * slope
            total += value
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
    if da is not None:
        tl.store(parts + tl.program_id(0) * H + column, tl.sum(total, 0), mask=column < H)


class BiasGelu(torch.autograd.Function):
    """``gelu(hidden + bias[expert])`` of rows [R, H] in expert order."""

    @staticmethod
    def forward(ctx, hidden: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, bias, offsets)
        return BiasGelu.launch(hidden, bias, None, offsets, None)

    @staticmethod
    def backward(ctx, da: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, bias, offsets = ctx.saved_tensors
        parts = torch.empty(len(bias), PARTS, bias.shape[1], device=bias.device)
        d_hidden = BiasGelu.launch(hidden, bias, da.contiguous(), offsets, parts)
        return d_hidden, parts.sum(1).to(bias.dtype), None

    @staticmethod
    def launch(hidden: Tensor, bias: Tensor, da: Tensor | None, offsets: Tensor, parts: Tensor | None) -> Tensor:
        out, (experts, width) = torch.empty_like(hidden), bias.shape
        _bias_gelu[(experts * PARTS, triton.cdiv(width, BLOCK_H))](
            hidden, bias, da, offsets, out, parts, width, PARTS=PARTS, BLOCK_R=BLOCK_R, BLOCK_H=BLOCK_H
        )
        return out


def grouped_mm_fused(x: Tensor, w: Weights) -> Tensor:
    gating, plan = routed(x, w)
    ends = plan.offsets[1:]
    hidden = F.grouped_mm(ck.permute(x, plan), w.in_weight.mT, offs=ends)
    a = BiasGelu.apply(hidden, w.in_bias, plan.offsets)
    y = ck.combine(F.grouped_mm(a, w.out_weight.mT, offs=ends), gating.gates, plan)
    return torch.addmm(y, shares(gating.gates, gating.expert_indices, x, len(w.router)), w.out_bias)


def quack_in(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, token_of_row: Tensor, keep_z: bool
) -> tuple[Tensor | None, Tensor]:
    """z and ``gelu(z)`` [R, H]: what ``project_in`` computes."""
    from quack.gemm_interface import gemm_act

    return gemm_act(
        x, weight.mT, bias=bias, activation="gelu_erf", cu_seqlens_m=offsets, A_idx=token_of_row, store_preact=keep_z,
        tuned=False,
    )  # fmt: skip


def quack_back(
    dy: Tensor, weight: Tensor, z: Tensor, gate_of_row: Tensor, offsets: Tensor, token_of_row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dz and the gated a [R, H], and <a, da> [R]: what ``project_back`` computes."""
    from quack.gemm_interface import gemm_dact

    return gemm_dact(
        dy, weight, z, activation="gelu_erf", colvec_scale=gate_of_row, colvec_reduce=True, cu_seqlens_m=offsets,
        A_idx=token_of_row, tuned=False,
    )  # fmt: skip


class QuackExperts(torch.autograd.Function):
    """The experts on QuACK; every row is a token's."""

    @staticmethod
    def forward(ctx, keep_z, x, gates, experts, in_weight, in_bias, out_weight, out_bias, *plan) -> Tensor:
        from quack.gemm_interface import gemm

        offsets, choice_of_row, _ = plan
        z, a = quack_in(x, in_weight, in_bias, offsets, choice_of_row // gates.shape[1], keep_z)
        ctx.save_for_backward(x, z, gates, experts, in_weight, out_weight, out_bias, *plan)
        out = gemm(a, out_weight.mT, bias=out_bias, cu_seqlens_m=offsets, tuned=False)
        return ck.combine(out, gates, ck.Plan(*plan))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        from quack.gemm_interface import gemm

        x, z, gates, experts, in_weight, out_weight, out_bias, *plan = ctx.saved_tensors
        offsets, choice_of_row, row_of_choice = plan
        tokens, gate_of_row = choice_of_row // gates.shape[1], gates.flatten()[choice_of_row]
        dz, scaled_a, products = quack_back(dy, out_weight, z, gate_of_row, offsets, tokens)
        d_gates = products[row_of_choice] + (dy @ out_bias.mT).float().gather(1, experts.long())
        d_out_bias = shares(gates, experts, dy, len(out_bias)).mT @ dy
        ones = dz.new_ones(len(dz), 16)  # as wide as its rows have to be
        d_in_bias = F.grouped_mm(ones.mT, dz, offs=offsets[1:])[:, 0]
        d_out = gemm(dy.mT, scaled_a, cu_seqlens_k=offsets, A_idx=tokens, tuned=False)
        d_in = gemm(x.mT, dz, cu_seqlens_k=offsets, A_idx=tokens, tuned=False).mT
        d_rows = gemm(dz, in_weight, cu_seqlens_m=offsets, tuned=False)
        dx = ck.combine(d_rows, torch.ones_like(gates), ck.Plan(*plan))
        return None, dx, d_gates, None, d_in, d_in_bias, d_out, d_out_bias, None, None, None


def quack(x: Tensor, w: Weights) -> Tensor:
    gating, plan = routed(x, w)
    return QuackExperts.apply(torch.is_grad_enabled(), x, gating.gates, gating.expert_indices, *w[1:5], *plan)
