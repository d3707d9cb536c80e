"""grouped_linear and expert_mlp on the CPU with torch's matmul, expert by expert.

For CPUs where that is faster than the micro-kernels of csrc/cpu (``registry``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import glu
from ..reference import activate
from . import cpp, torch_eager
from .plan_checks import check_offsets, check_rows
from .torch_eager import dense_mlp  # noqa: F401  it already uses torch's matmul


def _spans(offsets: Tensor, num_rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) for the experts that have any."""
    check_offsets(offsets, num_rows)
    edges = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(edges, edges[1:], strict=False)) if b > a]


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = rows @ weight^T + bias for one expert."""
    if bias is None:
        return torch.mm(rows, weight.mT, out=out)
    return torch.addmm(bias, rows, weight.mT, out=out)


def grouped_linear(rows, weight, bias, offsets) -> Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, span in _spans(offsets, len(rows)):
        _project(rows[span], weight[expert], None if bias is None else bias[expert], out[span])
    out[int(offsets[-1]) :] = 0
    return out


def grouped_linear_backward(d_out, rows, weight, offsets, output_mask) -> tuple[Tensor, ...]:
    need_rows, need_weight, need_bias = output_mask
    d_rows = rows.new_empty(rows.shape) if need_rows else rows.new_empty(0)
    d_weight = weight.new_zeros(weight.shape) if need_weight else rows.new_empty(0)
    d_bias = weight.new_zeros(weight.shape[:2]) if need_bias else rows.new_empty(0)
    for expert, span in _spans(offsets, len(rows)):
        if need_rows:
            torch.mm(d_out[span], weight[expert], out=d_rows[span])
        if need_weight:
            torch.mm(d_out[span].mT, rows[span], out=d_weight[expert])
        if need_bias:
            d_bias[expert] = d_out[span].sum(0, dtype=torch.float32)
    if need_rows:
        d_rows[int(offsets[-1]) :] = 0
    return d_rows, d_weight, d_bias


def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = cpp.permute(x, offsets, choice_of_row, row_of_choice)
    num_rows, hidden = rows.shape[0], in_weight.shape[1]
    projections = [(in_weight, in_bias)] if gate_weight is None else [(in_weight, in_bias), (gate_weight, gate_bias)]
    z = x.new_empty((len(projections), num_rows, hidden) if keep_z else 0)
    out = torch.empty_like(rows)
    for expert, span in _spans(offsets, len(rows)):
        scratch = z[:, span] if keep_z else x.new_empty(len(projections), span.stop - span.start, hidden)
        for (weight, bias), pre in zip(projections, scratch, strict=True):
            _project(rows[span], weight[expert], None if bias is None else bias[expert], pre)
        a = activate(scratch[-1], activation)
        if gate_weight is not None:
            a *= scratch[0]
        _project(a, out_weight[expert], None if out_bias is None else out_bias[expert], out[span])
    if keep_z:
        z[:, int(offsets[-1]) :] = 0
        z = z if gate_weight is not None else z[0]
    return cpp.combine(out, gates, offsets, choice_of_row, row_of_choice), z


def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_gates, need_in, need_out = output_mask
    check_rows(row_of_choice, row_of_choice.numel())
    gated = gate_weight is not None

    def gradient_of(parameter: Tensor | None, wanted: bool) -> Tensor:
        return x.new_zeros(parameter.shape) if wanted and parameter is not None else x.new_empty(0)

    d_in_weight, d_in_bias = gradient_of(in_weight, need_in), gradient_of(in_bias, need_in)
    d_gate_weight, d_gate_bias = gradient_of(gate_weight, need_in), gradient_of(gate_bias, need_in)
    d_out_weight, d_out_bias = gradient_of(out_weight, need_out), gradient_of(out_bias, need_out)

    rows = cpp.permute(x, offsets, choice_of_row, row_of_choice)
    d_row = cpp.permute(dy, offsets, choice_of_row, row_of_choice)
    gate = torch_eager.gate_of_row(gates, choice_of_row)[:, None]
    d_gate_of_row = gates.new_zeros(rows.shape[0])
    d_rows = torch.empty_like(rows) if need_x else rows.new_empty(0)

    for expert, span in _spans(offsets, len(rows)):
        if z.numel() == 0:
            z_e = torch.stack([
                torch.nn.functional.linear(rows[span], weight[expert], None if bias is None else bias[expert])
                for weight, bias in ([(in_weight, in_bias)] + [(gate_weight, gate_bias)] * gated)
            ])  # fmt: skip
            z_e = z_e if gated else z_e[0]
        else:
            z_e = z[..., span, :]
        a = torch_eager.activate_z(z_e, activation)
        da = d_row[span] @ out_weight[expert]
        if need_gates:
            d_gate_of_row[span] = (a * da).sum(-1, dtype=torch.float32)
            if out_bias is not None:
                d_gate_of_row[span] += d_row[span].float() @ out_bias[expert].float()
        if need_out:
            scaled = d_row[span].mul(gate[span]).to(x.dtype)
            torch.mm(scaled.mT, a, out=d_out_weight[expert])
            if out_bias is not None:
                d_out_bias[expert] = scaled.sum(0, dtype=torch.float32)
        if not (need_in or need_x):
            continue
        dz = torch_eager.activate_z_backward(da.mul_(gate[span]), z_e, activation)
        dz_in, dz_gate = dz.unbind() if gated else (dz, dz)  # dz_gate is read of gated experts alone
        if need_in:
            torch.mm(dz_in.mT, rows[span], out=d_in_weight[expert])
            if in_bias is not None:
                d_in_bias[expert] = dz_in.sum(0, dtype=torch.float32)
            if gated:
                torch.mm(dz_gate.mT, rows[span], out=d_gate_weight[expert])
                if gate_bias is not None:
                    d_gate_bias[expert] = dz_gate.sum(0, dtype=torch.float32)
        if need_x:
            torch.mm(dz_in, in_weight[expert], out=d_rows[span])
            if gate_weight is not None:
                d_rows[span].addmm_(dz_gate, gate_weight[expert])

    return (
        cpp.gather_sum(d_rows, row_of_choice) if need_x else x.new_empty(0),
        torch_eager.per_choice(d_gate_of_row, row_of_choice) if need_gates else gates.new_empty(0),
        d_in_weight,
        d_in_bias,
        d_out_weight,
        d_out_bias,
        d_gate_weight,
        d_gate_bias,
    )


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
