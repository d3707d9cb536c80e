"""router_logits and its backward: few outputs per token, so tokens are read once, in their storage type.

    x, weight --_logits--> logits            d_logits, weight --_token_gradient--> d_x
    d_logits, x --_weight_sums--> sums per range of tokens --_add_up--> d_weight

Products and sums are float32 outside of the tensor cores, which would round them: with 8 experts the arithmetic is
hidden behind the loads. The gradients take their factors from shared memory ("ieee" dots), with far
fewer instructions than if they were broadcast from registers, as those of the logits are. The split of tokens into
ranges depends only on T and E, so every GPU adds in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, ceil_div, dense, power_of_two
from .variants import TYPE_NAMES, Variant, signature

_EXPERTS = 8  # per program of logits; with more experts, tokens are read again, from the second-level cache
_LOGITS = {"BLOCK_T": 8, "BLOCK_D": 128}
_TOKEN = {"BLOCK_T": 32, "BLOCK_E": 16, "BLOCK_D": 128}
_WEIGHT = {"BLOCK_T": 32, "BLOCK_D": 128}
_WEIGHT_EXPERTS = (8, 32)  # per program, at least and at most
_ADD_UP = {"BLOCK_S": 32, "BLOCK": 64}
_PARTIAL_SUMS = 2048  # partial sums of a column of the weight, over all experts: enough programs for any GPU
_OPTIONS = {"num_warps": 4, "num_stages": 1, **FUSED}
_LOGITS_OPTIONS = {**_OPTIONS, "num_warps": 8}  # with four, Triton 3.6 spills registers


@triton.jit
def _unmasked(mask, token, T):
    """Which tokens are below T and not masked; the others are never read."""
    part = token < T
    if mask is not None:
        part = part & (tl.load(mask + token, mask=part, other=0) != 0)
    return part


@triton.jit(do_not_specialize=["T", "E"])
def _logits(
    x, weight, mask, logits, T, D, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = _unmasked(mask, token, T)
    # Each thread sums its own columns; the threads' sums are added once, at the end.
    products = tl.zeros([BLOCK_T, BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        read = part[:, None] & (column < D)[None, :]
        rows = tl.load(x + token[:, None] * D + column[None, :], mask=read, other=0.0)
        read = (expert < E)[:, None] & (column < D)[None, :]
        weights = tl.load(weight + expert[:, None] * D + column[None, :], mask=read, other=0.0)
        products += rows.to(tl.float32)[:, None, :] * weights[None, :, :]
    place = logits + token[:, None] * E + expert[None, :]
    tl.store(place, tl.sum(products, axis=2), mask=(token < T)[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["T", "E"])
def _token_gradient(
    d_logits, weight, mask, d_x, T, D, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = _unmasked(mask, token, T)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        read = part[:, None] & (expert < E)[None, :]
        gradients = tl.load(d_logits + token[:, None] * E + expert[None, :], mask=read, other=0.0)
        read = (expert < E)[:, None] & (column < D)[None, :]
        weights = tl.load(weight + expert[:, None] * D + column[None, :], mask=read, other=0.0)
        total = tl.dot(gradients, weights, total, input_precision="ieee")
    place = d_x + token[:, None] * D + column[None, :]
    tl.store(place, total.to(d_x.dtype.element_ty), mask=(token < T)[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["T", "E", "share"])
def _weight_sums(
    d_logits, x, mask, sums, T, D, E, share, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Program s sums tokens ``s * share`` to ``(s + 1) * share``."""
    split = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(0, share, BLOCK_T):
        token = split * share + start + tl.arange(0, BLOCK_T)
        part = _unmasked(mask, token, T)
        read = part[:, None] & (expert < E)[None, :]
        gradients = tl.load(d_logits + token[:, None] * E + expert[None, :], mask=read, other=0.0)
        read = part[:, None] & (column < D)[None, :]
        rows = tl.load(x + token[:, None] * D + column[None, :], mask=read, other=0.0)
        total = tl.dot(tl.trans(rows).to(tl.float32), gradients, total, input_precision="ieee")
    place = sums + (split * E + expert[None, :]) * D + column[:, None]
    tl.store(place, total, mask=(expert < E)[None, :] & (column < D)[:, None])


@triton.jit(do_not_specialize=["splits"])
def _add_up(sums, d_weight, splits, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (split < splits)[:, None] & (element < size)[None, :]
        total += tl.load(sums + split[:, None] * size + element[None, :], mask=inside, other=0.0)
    tl.store(d_weight + element, tl.sum(total, axis=0), mask=element < size)


def router_logits(x, weight, mask=None) -> Tensor:
    x, weight, mask = dense(x, weight, mask)
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    logits = weight.new_empty(num_tokens, num_experts)
    if num_tokens:
        block_e = min(_EXPERTS, power_of_two(num_experts))
        with torch.cuda.device_of(x):
            _logits[(ceil_div(num_tokens, _LOGITS["BLOCK_T"]), ceil_div(num_experts, block_e))](
                x, weight, mask, logits, num_tokens, width, num_experts, BLOCK_E=block_e, **_LOGITS, **_LOGITS_OPTIONS
            )
    return logits


def router_logits_backward(d_logits, x, weight, mask, output_mask) -> tuple[Tensor, Tensor]:
    d_logits, x, weight, mask = dense(d_logits, x, weight, mask)
    d_x = _d_x(d_logits, x, weight, mask) if output_mask[0] else x.new_empty(0)
    d_weight = _d_weight(d_logits, x, weight, mask) if output_mask[1] else weight.new_empty(0)
    return d_x, d_weight


def _d_x(d_logits: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    d_x = torch.empty_like(x)
    if d_x.numel():
        grid = ceil_div(num_tokens, _TOKEN["BLOCK_T"]), ceil_div(width, _TOKEN["BLOCK_D"])
        with torch.cuda.device_of(x):
            _token_gradient[grid](d_logits, weight, mask, d_x, num_tokens, width, num_experts, **_TOKEN, **_OPTIONS)
    return d_x


def _d_weight(d_logits: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    if num_tokens == 0 or width == 0:
        return torch.zeros_like(weight)
    steps = ceil_div(num_tokens, _WEIGHT["BLOCK_T"])
    share = ceil_div(steps, max(1, _PARTIAL_SUMS // num_experts)) * _WEIGHT["BLOCK_T"]
    splits = ceil_div(num_tokens, share)
    block_e = max(_WEIGHT_EXPERTS[0], min(_WEIGHT_EXPERTS[1], power_of_two(num_experts)))
    sums, d_weight = weight.new_empty(splits, *weight.shape), torch.empty_like(weight)
    grid = splits, ceil_div(width, _WEIGHT["BLOCK_D"]), ceil_div(num_experts, block_e)
    with torch.cuda.device_of(x):
        _weight_sums[grid](
            d_logits, x, mask, sums, num_tokens, width, num_experts, share, BLOCK_E=block_e, **_WEIGHT, **_OPTIONS
        )
        _add_up[(ceil_div(weight.numel(), _ADD_UP["BLOCK"]),)](
            sums, d_weight, splits, weight.numel(), **_ADD_UP, **_OPTIONS
        )
    return d_weight


def variants(arch: int) -> Iterator[Variant]:
    """Every storage type at a width that is a multiple of 16, and one width that is not, with a mask; few experts and
    many."""
    shared = {"logits": "*fp32", "d_logits": "*fp32", "weight": "*fp32", "d_weight": "*fp32", "sums": "*fp32"}
    shared |= {"mask": "*u8"} | dict.fromkeys(("T", "E", "share", "splits"), "i32") | {"size": "i32:16"}
    stages = [
        ("router_logits", _logits, {"BLOCK_E": _EXPERTS} | _LOGITS, _LOGITS_OPTIONS),
        ("router_d_x", _token_gradient, _TOKEN, _OPTIONS),
    ]
    for experts in _WEIGHT_EXPERTS:
        stages.append((f"router_weight_sums E={experts}", _weight_sums, {"BLOCK_E": experts} | _WEIGHT, _OPTIONS))
    for dtype, width in (*((name, "i32:16") for name in TYPE_NAMES.values()), ("bf16", "i32")):
        types = shared | dict.fromkeys(("x", "d_x"), f"*{dtype}") | {"D": width}
        for stage, kernel, constants, options in stages:
            name = f"{stage} {dtype}" + ("" if width == "i32:16" else ", odd width")
            yield Variant(name, kernel, signature(kernel, types, constants), constants, options)
    yield Variant("router_add_up", _add_up, signature(_add_up, shared, _ADD_UP), _ADD_UP, _OPTIONS)
