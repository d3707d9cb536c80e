"""The ops on CPU tensors: C++ for routing, permutation and combine, torch's matmul per expert between them.

Every function takes what its op takes. Without the compiled extension, and in float64, ``generic`` answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from . import generic
from .info import NATIVE
from .reference import activate

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def native(function: Callable) -> Callable:
    """Sends calls that the extension does not serve (none built, float64) to the op's ``generic`` namesake."""
    otherwise = getattr(generic, function.__name__)

    @wraps(function)
    def chosen(first: Tensor, *args):
        serves = NATIVE is not None and first.dtype != torch.float64
        return (function if serves else otherwise)(first, *args)

    return chosen


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _end_address(offsets: Tensor) -> int:
    """Address of offsets[E], the number of rows in use."""
    return offsets.data_ptr() + (offsets.numel() - 1) * offsets.element_size()


@native
def topk_gating(logits, k, renormalize, selection_bias=None, mask=None) -> tuple[Tensor, ...]:
    logits, selection_bias, mask = _dense(logits, selection_bias, mask)
    num_tokens, num_experts = logits.shape
    outputs = (
        logits.new_empty(num_tokens, k),
        logits.new_empty(num_tokens, k, dtype=torch.int32),
        logits.new_empty(num_tokens),
        logits.new_empty(num_experts),
        logits.new_empty(()),
        logits.new_empty(k, num_experts, dtype=torch.int32),
    )
    NATIVE.topk_gating(
        _address(logits), _address(mask), _address(selection_bias), num_tokens, num_experts, k, renormalize,
        *map(_address, outputs),
    )  # fmt: skip
    return outputs


@native
def topk_gating_backward(
    logits, experts, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    logits, experts, mask = _dense(logits, experts, mask)
    grads = _dense(d_gates, d_top_prob, d_mean_probs, d_z_loss)
    d_logits = torch.empty_like(logits)
    NATIVE.topk_gating_backward(
        _address(logits), _address(mask), _address(experts), *logits.shape, experts.shape[1], renormalize,
        *map(_address, grads), _address(d_logits),
    )  # fmt: skip
    return d_logits


def dispatch(experts, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    if NATIVE is None:
        wrong = experts[(experts < -1) | (experts >= num_experts)]
        if len(wrong):
            raise ValueError(f"experts: expected values from -1 to {num_experts - 1}, got {int(wrong[0])}")
        return generic.dispatch(experts, num_experts, capacity_factor, priority, mask)
    experts, priority, mask = _dense(experts, priority, mask)
    outputs = (
        experts.new_empty(num_experts + 1),
        experts.new_empty(experts.numel()),
        experts.new_empty(experts.shape),
    )
    NATIVE.dispatch(
        _address(experts), _address(mask), _address(priority), *experts.shape, num_experts,
        -1.0 if capacity_factor is None else capacity_factor, *map(_address, outputs),
    )  # fmt: skip
    return outputs


@native
def permute(x, offsets, choice_of_row, row_of_choice) -> Tensor:
    x, offsets, choice_of_row = _dense(x, offsets, choice_of_row)
    width, num_rows = x.shape[1], choice_of_row.numel()
    rows = x.new_empty(num_rows, width)
    NATIVE.permute(
        _address(x), width * x.element_size(), _address(choice_of_row), _end_address(offsets), num_rows,
        row_of_choice.shape[1], _address(rows),
    )  # fmt: skip
    return rows


@native
def gather_sum(rows, row_of_choice) -> Tensor:
    return _gather_sum(rows, None, row_of_choice)


@native
def combine(rows, gates, offsets, choice_of_row, row_of_choice) -> Tensor:
    return _gather_sum(rows, gates, row_of_choice)


def _gather_sum(rows: Tensor, gates: Tensor | None, row_of_choice: Tensor) -> Tensor:
    rows, gates, row_of_choice = _dense(rows, gates, row_of_choice)
    num_tokens, k = row_of_choice.shape
    y = rows.new_empty(num_tokens, rows.shape[1])
    NATIVE.gather_sum(
        _address(rows), DTYPE_CODE[rows.dtype], _address(row_of_choice), _address(gates), num_tokens, k,
        rows.shape[1], _address(y),
    )  # fmt: skip
    return y


@native
def combine_backward(dy, rows, gates, offsets, choice_of_row, row_of_choice) -> tuple[Tensor, Tensor]:
    dy, rows, gates, offsets, row_of_choice = _dense(dy, rows, gates, offsets, row_of_choice)
    d_rows, d_gates = torch.empty_like(rows), torch.empty_like(gates)
    NATIVE.combine_backward(
        _address(dy), _address(rows), DTYPE_CODE[rows.dtype], _address(gates), _address(row_of_choice),
        *row_of_choice.shape, rows.shape[1], _end_address(offsets), rows.shape[0], _address(d_rows),
        _address(d_gates),
    )  # fmt: skip
    return d_rows, d_gates


def _spans(offsets: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) for the experts that have any."""
    edges = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(edges, edges[1:], strict=False)) if b > a]


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = rows @ weight^T + bias for one expert."""
    if bias is None:
        return torch.mm(rows, weight.mT, out=out)
    return torch.addmm(bias, rows, weight.mT, out=out)


@native
def grouped_linear(rows, weight, bias, offsets) -> Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, span in _spans(offsets):
        _project(rows[span], weight[expert], None if bias is None else bias[expert], out[span])
    out[int(offsets[-1]) :] = 0
    return out


@native
def grouped_linear_backward(d_out, rows, weight, offsets, output_mask) -> tuple[Tensor, ...]:
    need_rows, need_weight, need_bias = output_mask
    d_rows = torch.empty_like(rows) if need_rows else rows.new_empty(0)
    d_weight = torch.zeros_like(weight) if need_weight else rows.new_empty(0)
    d_bias = weight.new_zeros(weight.shape[:2]) if need_bias else rows.new_empty(0)
    for expert, span in _spans(offsets):
        if need_rows:
            torch.mm(d_out[span], weight[expert], out=d_rows[span])
        if need_weight:
            torch.mm(d_out[span].mT, rows[span], out=d_weight[expert])
        if need_bias:
            d_bias[expert] = d_out[span].sum(0, dtype=torch.float32)
    if need_rows:
        d_rows[int(offsets[-1]) :] = 0
    return d_rows, d_weight, d_bias


@native
def expert_mlp_forward(
    x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias,
    activation, keep_z,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = permute(x, offsets, choice_of_row, row_of_choice)
    num_rows, hidden = rows.shape[0], in_weight.shape[1]
    projections = [(in_weight, in_bias)] if gate_weight is None else [(in_weight, in_bias), (gate_weight, gate_bias)]
    z = x.new_empty((len(projections), num_rows, hidden) if keep_z else 0)
    out = torch.empty_like(rows)
    for expert, span in _spans(offsets):
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
    return _gather_sum(out, gates, row_of_choice), z


@native
def expert_mlp_backward(
    dy, x, gates, offsets, choice_of_row, row_of_choice, in_weight, in_bias, out_weight, out_bias, gate_weight,
    gate_bias, z, activation, output_mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_gates, need_in, need_out = output_mask
    gated = gate_weight is not None

    def gradient_of(parameter: Tensor | None, wanted: bool) -> Tensor:
        return x.new_zeros(parameter.shape) if wanted and parameter is not None else x.new_empty(0)

    d_in_weight, d_in_bias = gradient_of(in_weight, need_in), gradient_of(in_bias, need_in)
    d_gate_weight, d_gate_bias = gradient_of(gate_weight, need_in), gradient_of(gate_bias, need_in)
    d_out_weight, d_out_bias = gradient_of(out_weight, need_out), gradient_of(out_bias, need_out)

    rows = permute(x, offsets, choice_of_row, row_of_choice)
    d_row = permute(dy, offsets, choice_of_row, row_of_choice)
    gate = generic.gate_of_row(gates, choice_of_row)[:, None]
    d_gate_of_row = gates.new_zeros(rows.shape[0])
    d_rows = torch.empty_like(rows) if need_x else None

    for expert, span in _spans(offsets):
        if z.numel() == 0:
            z_e = torch.stack([
                torch.nn.functional.linear(rows[span], weight[expert], None if bias is None else bias[expert])
                for weight, bias in ([(in_weight, in_bias)] + [(gate_weight, gate_bias)] * gated)
            ])  # fmt: skip
            z_e = z_e if gated else z_e[0]
        else:
            z_e = z[..., span, :]
        a = generic.activate_z(z_e, activation)
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
        dz = generic.activate_z_backward(da.mul_(gate[span]), z_e, activation)
        dz_in, dz_gate = dz.unbind() if gated else (dz, None)
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
            if gated:
                d_rows[span].addmm_(dz_gate, gate_weight[expert])

    return (
        _gather_sum(d_rows, None, row_of_choice) if need_x else x.new_empty(0),
        generic.per_choice(d_gate_of_row, row_of_choice) if need_gates else gates.new_empty(0),
        d_in_weight,
        d_in_bias,
        d_out_weight,
        d_out_bias,
        d_gate_weight,
        d_gate_bias,
    )
