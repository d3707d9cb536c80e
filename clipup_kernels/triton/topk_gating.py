"""topk_gating: softmax over the experts, the k best of them, and their statistics, in one pass over the logits.

    logits --_gating--> gates, expert_indices, top_prob; per program: sums of probabilities and z^2, counts of tokens
    these partial sums --_reduce--> mean_probs, z_loss, tokens_per_expert

Every program sums over its own range of tokens, and ``_reduce`` adds the programs' sums in a fixed order. The number of
programs depends only on T and E, never on the device, so every GPU adds in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, ceil_div, dense, power_of_two
from .variants import Variant, signature

_MAX_PROGRAMS = 512
_TILE = 1024  # elements of a tile of tokens and experts: 8 per thread, because several tiles stay in registers
_OPTIONS = {"num_warps": 4, "num_stages": 1, **FUSED}
_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _softmax(logits, mask, tokens, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """For a tile of tokens: logits (-inf past E), probabilities (0 past E), logsumexp, and which tokens are not masked.

    Logits of masked tokens, which may be NaN, are not read and count as 0.
    """
    columns = tl.arange(0, BLOCK_E)
    unmasked = tokens < T
    if mask is not None:
        unmasked = unmasked & (tl.load(mask + tokens, mask=unmasked, other=0) != 0)
    inside = columns[None, :] < E
    address = logits + tokens.to(tl.int64)[:, None] * E + columns[None, :]
    tile = tl.load(address, mask=unmasked[:, None] & inside, other=0.0)
    tile = tl.where(inside, tile, float("-inf"))
    highest = tl.max(tile, axis=1)
    exponentials = tl.where(inside, tl.exp(tile - highest[:, None]), 0.0)
    total = tl.sum(exponentials, axis=1)
    return tile, exponentials / total[:, None], highest + tl.log(total), unmasked


@triton.jit
def _renormalized(chosen, log_sum):
    """The softmax over the chosen logits alone, -inf in the other places: it sums to 1 even where the probabilities
    underflow. If all are -inf it is 0, not NaN; a NaN of any logit of the token makes ``log_sum`` NaN, and shows."""
    highest = tl.maximum(tl.max(chosen, axis=1), _LOWEST)
    gates = tl.exp(chosen - highest[:, None])
    return gates / (tl.maximum(tl.sum(gates, axis=1), _TINY) + (log_sum - log_sum))[:, None]


@triton.jit(do_not_specialize=["T", "tiles"])
def _gating(
    logits, selection_bias, mask, gates, expert_indices, top_prob, prob_sums, z_sums, token_counts, choice_counts, T,
    tiles, E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    choices = tl.arange(0, BLOCK_K)
    prob_sum = tl.zeros([BLOCK_E], tl.float32)
    z_sum = tl.zeros([BLOCK_T], tl.float32)
    token_count = tl.zeros([BLOCK_T], tl.int32)
    tokens_per_expert = tl.zeros([BLOCK_K, BLOCK_E], tl.int32)
    for tile in range(tiles):
        tokens = (program * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        scores, probs, log_sum, unmasked = _softmax(logits, mask, tokens, T, E, BLOCK_E)
        prob_sum += tl.sum(tl.where(unmasked[:, None], probs, 0.0), axis=0)
        z_sum += tl.where(unmasked, log_sum * log_sum, 0.0)
        token_count += unmasked.to(tl.int32)
        top = tl.max(probs, axis=1)
        # Logits order the experts as their probabilities do, and still do where those underflow.
        if selection_bias is not None:
            scores = probs + tl.load(selection_bias + columns, mask=columns < E, other=0.0)[None, :]
        # NaN counts as -inf, so that the K experts are distinct for any scores.
        scores = tl.where(scores == scores, scores, float("-inf"))

        free = (columns[None, :] < E) & (tokens[:, None] >= 0)
        chosen = tl.full([BLOCK_T, BLOCK_K], -1, tl.int32)
        weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for k in range(K):
            best = tl.max(tl.where(free, scores, float("-inf")), axis=1)
            expert = tl.min(tl.where(free & (scores == best[:, None]), columns[None, :], BLOCK_E), axis=1)
            hit = columns[None, :] == expert[:, None]
            chosen = tl.where(choices[None, :] == k, expert[:, None], chosen)
            if not RENORMALIZE:
                prob = tl.sum(tl.where(hit, probs, 0.0), axis=1)
                weights = tl.where(choices[None, :] == k, prob[:, None], weights)
            hits = tl.sum((hit & unmasked[:, None]).to(tl.int32), axis=0)
            tokens_per_expert += tl.where(choices[:, None] == k, hits[None, :], 0)
            free = free & (columns[None, :] != expert[:, None])
        place = tokens.to(tl.int64)[:, None] * K + choices[None, :]
        inside = (tokens[:, None] < T) & (choices[None, :] < K)
        if RENORMALIZE:  # read again, because kept in registers they spill
            address = logits + tokens.to(tl.int64)[:, None] * E + chosen
            chosen_logits = tl.load(address, mask=inside & unmasked[:, None], other=float("-inf"))
            weights = _renormalized(chosen_logits, log_sum)
        tl.store(gates + place, tl.where(unmasked[:, None], weights, 0.0), mask=inside)
        tl.store(expert_indices + place, tl.where(unmasked[:, None], chosen, -1), mask=inside)
        tl.store(top_prob + tokens, tl.where(unmasked, top, 0.0), mask=tokens < T)

    tl.store(prob_sums + program * E + columns, prob_sum, mask=columns < E)
    tl.store(z_sums + program, tl.sum(z_sum, axis=0))
    tl.store(token_counts + program, tl.sum(token_count, axis=0))
    place = (program * K + choices[:, None]) * E + columns[None, :]
    tl.store(choice_counts + place, tokens_per_expert, mask=(choices[:, None] < K) & (columns[None, :] < E))


@triton.jit(do_not_specialize=["programs"])
def _reduce(
    prob_sums, z_sums, token_counts, choice_counts, mean_probs, z_loss, tokens_per_expert, programs,
    E: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program k < K adds up tokens per expert of choice k, program K everything else."""
    task = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    if task < K:
        counts = tl.zeros([BLOCK_P, BLOCK_E], tl.int32)
        for start in range(0, programs, BLOCK_P):
            program = start + tl.arange(0, BLOCK_P)
            inside = (program[:, None] < programs) & (columns[None, :] < E)
            counts += tl.load(
                choice_counts + (program[:, None] * K + task) * E + columns[None, :], mask=inside, other=0
            )
        tl.store(tokens_per_expert + task * E + columns, tl.sum(counts, axis=0), mask=columns < E)
    else:
        probs = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
        z = tl.zeros([BLOCK_P], tl.float32)
        tokens = tl.zeros([BLOCK_P], tl.int32)
        for start in range(0, programs, BLOCK_P):
            program = start + tl.arange(0, BLOCK_P)
            inside = (program[:, None] < programs) & (columns[None, :] < E)
            probs += tl.load(prob_sums + program[:, None] * E + columns[None, :], mask=inside, other=0.0)
            z += tl.load(z_sums + program, mask=program < programs, other=0.0)
            tokens += tl.load(token_counts + program, mask=program < programs, other=0)
        num_unmasked = tl.maximum(tl.sum(tokens, axis=0), 1).to(tl.float32)
        tl.store(mean_probs + columns, tl.sum(probs, axis=0) / num_unmasked, mask=columns < E)
        tl.store(z_loss, tl.sum(z, axis=0) / num_unmasked)


@triton.jit(do_not_specialize=["T"])
def _gating_backward(
    logits, expert_indices, mask, num_unmasked, d_gates, d_top_prob, d_mean_probs, d_z_loss, d_logits, T,
    E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_E)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile_logits, probs, log_sum, unmasked = _softmax(logits, mask, tokens, T, E, BLOCK_E)
    count = T
    if num_unmasked is not None:
        count = tl.load(num_unmasked)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    d_probs = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    d_tile = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)

    if d_mean_probs is not None:
        d_probs += (share * tl.load(d_mean_probs + columns, mask=columns < E, other=0.0))[None, :]
    if d_top_prob is not None:
        top = tl.max(probs, axis=1)
        first = tl.min(tl.where(probs == top[:, None], columns[None, :], BLOCK_E), axis=1)
        d_top = tl.load(d_top_prob + tokens, mask=unmasked, other=0.0)
        d_probs += tl.where(columns[None, :] == first[:, None], d_top[:, None], 0.0)
    if d_gates is not None:
        d_gate = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for k in range(K):
            place = tokens.to(tl.int64) * K + k
            expert = tl.load(expert_indices + place, mask=unmasked, other=-1)
            hit = columns[None, :] == expert[:, None]
            d_gate += tl.where(hit, tl.load(d_gates + place, mask=unmasked, other=0.0)[:, None], 0.0)
            chosen += hit.to(tl.int32)
        if RENORMALIZE:
            gates = _renormalized(tl.where(chosen > 0, tile_logits, float("-inf")), log_sum)
            d_tile += gates * (d_gate - tl.sum(gates * d_gate, axis=1)[:, None])
        else:
            d_probs += d_gate

    d_tile += probs * (d_probs - tl.sum(probs * d_probs, axis=1)[:, None])
    if d_z_loss is not None:
        d_tile += probs * (share * 2.0 * tl.load(d_z_loss) * log_sum)[:, None]
    address = d_logits + tokens.to(tl.int64)[:, None] * E + columns[None, :]
    inside = (tokens[:, None] < T) & (columns[None, :] < E)
    tl.store(address, tl.where(unmasked[:, None], d_tile, 0.0), mask=inside)


def _blocks(num_experts: int, k: int) -> dict[str, int]:
    """BLOCK_T, BLOCK_E and BLOCK_K: powers of two, of which the last two hold every expert and every choice."""
    block_e = max(4, power_of_two(num_experts))
    block_t = max(1, _TILE // block_e)
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": power_of_two(k)}


def _gating_options(num_experts: int) -> dict[str, int]:
    """More than eight experts get twice the warps: with four, Triton 3.6 spills registers."""
    return {**_OPTIONS, "num_warps": 4 if num_experts <= 8 else 8}


def _reduce_blocks(num_experts: int) -> dict[str, int]:
    block_e = max(4, power_of_two(num_experts))
    return {"BLOCK_P": max(1, 2 * _TILE // block_e), "BLOCK_E": block_e}


def topk_gating(logits, k, renormalize, selection_bias=None, mask=None) -> tuple[Tensor, ...]:
    logits, selection_bias, mask = dense(logits, selection_bias, mask)
    num_tokens, num_experts = logits.shape
    gates = logits.new_empty(num_tokens, k)
    expert_indices = logits.new_empty(num_tokens, k, dtype=torch.int32)
    top_prob = logits.new_empty(num_tokens)
    statistics = logits.new_zeros if num_tokens == 0 else logits.new_empty
    mean_probs, z_loss = statistics(num_experts), statistics(())
    tokens_per_expert = statistics(k, num_experts, dtype=torch.int32)
    outputs = (gates, expert_indices, top_prob, mean_probs, z_loss, tokens_per_expert)
    if num_tokens == 0:
        return outputs

    blocks = _blocks(num_experts, k)
    num_tiles = ceil_div(num_tokens, blocks["BLOCK_T"])
    tiles = ceil_div(num_tiles, _MAX_PROGRAMS)
    programs = ceil_div(num_tiles, tiles)
    partial_sums = (
        logits.new_empty(programs, num_experts),
        logits.new_empty(programs),
        logits.new_empty(programs, dtype=torch.int32),
        logits.new_empty(programs, k, num_experts, dtype=torch.int32),
    )
    with torch.cuda.device_of(logits):
        _gating[(programs,)](
            logits, selection_bias, mask, gates, expert_indices, top_prob, *partial_sums, num_tokens, tiles,
            E=num_experts, K=k, RENORMALIZE=renormalize, **blocks, **_gating_options(num_experts),
        )  # fmt: skip
        _reduce[(k + 1,)](
            *partial_sums, mean_probs, z_loss, tokens_per_expert, programs,
            E=num_experts, K=k, **_reduce_blocks(num_experts), **_OPTIONS,
        )  # fmt: skip
    return outputs


def topk_gating_backward(
    logits, expert_indices, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    num_tokens, num_experts = logits.shape
    counted = mask is not None and (d_mean_probs is not None or d_z_loss is not None)
    num_unmasked = mask.sum() if counted else None
    logits, expert_indices, mask, *gradients = dense(
        logits, expert_indices, mask, d_gates, d_top_prob, d_mean_probs, d_z_loss
    )
    d_logits = torch.empty_like(logits)
    if num_tokens == 0:
        return d_logits
    k = expert_indices.shape[1]
    blocks = _blocks(num_experts, k)
    del blocks["BLOCK_K"]
    with torch.cuda.device_of(logits):
        _gating_backward[(ceil_div(num_tokens, blocks["BLOCK_T"]),)](
            logits, expert_indices, mask, num_unmasked, *gradients, d_logits, num_tokens,
            E=num_experts, K=k, RENORMALIZE=renormalize, **blocks, **_OPTIONS,
        )  # fmt: skip
    return d_logits


def variants(arch: int) -> Iterator[Variant]:
    """The kernels for routers of 8 to 256 experts; other numbers of experts and choices differ in constants."""
    floats = ("logits", "selection_bias", "gates", "top_prob", "prob_sums", "z_sums", "mean_probs", "z_loss")
    gradients = ("d_gates", "d_top_prob", "d_mean_probs", "d_z_loss", "d_logits")
    integers = ("expert_indices", "token_counts", "choice_counts", "tokens_per_expert")
    pointers = dict.fromkeys((*floats, *gradients), "*fp32") | dict.fromkeys(integers, "*i32")
    pointers |= {"num_unmasked": "*i64", "mask": "*u8"}
    types = pointers | {"T": "i32", "tiles": "i32", "programs": "i32"}

    def variant(name, kernel, options=_OPTIONS, **constants) -> Variant:
        return Variant(name, kernel, signature(kernel, types, constants), constants, options)

    for num_experts, k in ((8, 2), (16, 8), (64, 8), (256, 8)):
        sizes, blocks = {"E": num_experts, "K": k}, _blocks(num_experts, k)
        name = f"E={num_experts} K={k}"
        options = _gating_options(num_experts)
        yield variant(f"gating {name}", _gating, options, **sizes, RENORMALIZE=True, **blocks)
        yield variant(f"gating_reduce {name}", _reduce, **sizes, **_reduce_blocks(num_experts))
        del blocks["BLOCK_K"]
        yield variant(f"gating_backward {name}", _gating_backward, **sizes, RENORMALIZE=True, **blocks)
    absent = {"selection_bias": None, "mask": None}
    yield variant("gating E=8 K=1 raw", _gating, E=8, K=1, RENORMALIZE=False, **absent, **_blocks(8, 1))
