"""dispatch: a stable counting sort of (token, choice) pairs by expert, in slot order, cut at the capacity.

    expert_indices --_count--> slots of every expert per block of slots, routed tokens per block
                   --_scan---> slots of the expert before the block; slots of every expert in total
                   --_assign-> offsets, choice_of_row, row_of_choice

A slot is the k-th choice of the i-th token in serving order; a block of slots is one choice of a range of tokens, and
blocks are ordered choice by choice. Only tokens' priorities are sorted, and nothing is atomic.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference import serving_order
from .launch import FUSED, ceil_div, dense, power_of_two
from .variants import Variant, signature

_MAX_BLOCKS = 256  # of tokens; every program of _assign sums that many counts
_TILE = 2048  # elements of a tile of slots and experts
_SCAN_EXPERTS = 32
_SCAN_ROWS = 64
_OPTIONS = {"num_warps": 4, "num_stages": 1, **FUSED}


@triton.jit
def _owners(expert_indices, order, mask, served, k, T, E: tl.constexpr, K: tl.constexpr):
    """Token of every slot (the k-th choices of the tokens served at ``served``), and its expert, -1 for none."""
    inside = served < T
    token = served
    if order is not None:
        token = tl.load(order + served, mask=inside, other=0).to(tl.int32)
    owner = tl.load(expert_indices + token.to(tl.int64) * K + k, mask=inside, other=-1)
    if mask is not None:
        owner = tl.where(tl.load(mask + token, mask=inside, other=0) != 0, owner, -1)
    return token, tl.where(owner < E, owner, -1)


@triton.jit(do_not_specialize=["T", "tiles", "blocks"])
def _count(
    expert_indices, order, mask, counts, token_counts, T, tiles, blocks,
    E: tl.constexpr, K: tl.constexpr, COUNT_TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    k = tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(tiles):
        served = (block * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        _, owner = _owners(expert_indices, order, mask, served, k, T, E, K)
        count += tl.sum((owner[:, None] == columns[None, :]).to(tl.int32), axis=0)
    tl.store(counts + (k * blocks + block) * E + columns, count, mask=columns < E)

    if COUNT_TOKENS:
        if k == 0:  # in order of position: the sum does not depend on serving order
            tokens_counted = tl.zeros([BLOCK_T], tl.int32)
            for tile in range(tiles):
                token = (block * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
                best = tl.full([BLOCK_T], -1, tl.int32)
                for choice in range(K):
                    place = expert_indices + token.to(tl.int64) * K + choice
                    owner = tl.load(place, mask=token < T, other=-1)
                    best = tl.maximum(best, tl.where(owner < E, owner, -1))
                if mask is not None:
                    best = tl.where(tl.load(mask + token, mask=token < T, other=0) != 0, best, -1)
                tokens_counted += (best >= 0).to(tl.int32)
            tl.store(token_counts + block, tl.sum(tokens_counted, axis=0))


@triton.jit(do_not_specialize=["rows"])
def _scan(counts, totals, rows, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """Turns the counts [rows, E] into the sums of the rows above, in place; a program processes BLOCK_E experts."""
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = counts + row[:, None] * E + columns[None, :]
        inside = (row[:, None] < rows) & (columns[None, :] < E)
        count = tl.load(place, mask=inside, other=0)
        tl.store(place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(totals + columns, total, mask=columns < E)


@triton.jit(do_not_specialize=["T", "tiles", "blocks", "factor_bits"])
def _assign(
    expert_indices, order, mask, places, totals, token_counts, offsets, choice_of_row, row_of_choice, T, tiles, blocks,
    factor_bits, E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    k = tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)

    # Every program recomputes the experts' capacity and first rows: a few loads instead of a launch.
    kept = tl.load(totals + columns, mask=columns < E, other=0)
    if factor_bits is not None:
        every_block = tl.arange(0, BLOCK_B)
        tokens = tl.sum(tl.load(token_counts + every_block, mask=every_block < blocks, other=0), axis=0)
        limit = tokens.to(tl.float64) * K
        capacity = tl.ceil(factor_bits.to(tl.float64, bitcast=True) * tokens.to(tl.float64) / E)
        kept = tl.minimum(kept, tl.where(capacity < limit, capacity, limit).to(tl.int32))
    last = tl.cumsum(kept, axis=0)
    first = last - kept
    used = tl.sum(kept, axis=0)
    if (block == 0) & (k == 0):
        tl.store(offsets, 0)
        tl.store(offsets + 1 + columns, last, mask=columns < E)

    place = tl.load(places + (k * blocks + block) * E + columns, mask=columns < E, other=0)
    for tile in range(tiles):
        served = (block * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = served < T
        token, owner = _owners(expert_indices, order, mask, served, k, T, E, K)
        hit = (owner[:, None] == columns[None, :]).to(tl.int32)
        rank = tl.sum(hit * (place[None, :] + tl.cumsum(hit, axis=0) - hit), axis=1)
        placed = inside & (owner >= 0) & (rank < tl.sum(hit * kept[None, :], axis=1))
        row = tl.sum(hit * first[None, :], axis=1) + rank
        choice = token.to(tl.int64) * K + k
        tl.store(row_of_choice + choice, tl.where(placed, row, -1), mask=inside)
        tl.store(choice_of_row + row, choice.to(tl.int32), mask=placed)
        slot = k * T + served
        tl.store(choice_of_row + slot, tl.full([BLOCK_T], -1, tl.int32), mask=inside & (slot >= used))
        place += tl.sum(hit, axis=0)


def _blocks(num_experts: int) -> dict[str, int]:
    block_e = max(4, power_of_two(num_experts))
    return {"BLOCK_T": min(512, max(16, _TILE // block_e)), "BLOCK_E": block_e}


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    """An expert index outside of [-1, E) counts as -1: checking it would make the host wait.

    With ``priority`` torch sorts the tokens first, stably and without a host wait.
    """
    num_tokens, k = expert_indices.shape
    checks.row_count(num_tokens, k)
    expert_indices, mask = dense(expert_indices, mask)
    if num_tokens == 0:
        return expert_indices.new_zeros(num_experts + 1), expert_indices.new_empty(0), expert_indices.new_empty(0, k)
    offsets = expert_indices.new_empty(num_experts + 1)
    choice_of_row, row_of_choice = expert_indices.new_empty(num_tokens * k), torch.empty_like(expert_indices)

    sizes = {"E": num_experts, "K": k, **_blocks(num_experts)}
    num_tiles = ceil_div(num_tokens, sizes["BLOCK_T"])
    tiles = ceil_div(num_tiles, _MAX_BLOCKS)
    blocks = ceil_div(num_tiles, tiles)
    counts, totals = expert_indices.new_empty(k * blocks, num_experts), expert_indices.new_empty(num_experts)
    token_counts = expert_indices.new_empty(blocks)
    limited = capacity_factor is not None
    with torch.cuda.device_of(expert_indices):
        order = None if priority is None else serving_order(priority)
        _count[(blocks, k)](
            expert_indices, order, mask, counts, token_counts, num_tokens, tiles, blocks,
            COUNT_TOKENS=limited, **sizes, **_OPTIONS,
        )  # fmt: skip
        _scan[(ceil_div(num_experts, _SCAN_EXPERTS),)](
            counts, totals, k * blocks, E=num_experts, BLOCK_R=_SCAN_ROWS, BLOCK_E=_SCAN_EXPERTS, **_OPTIONS
        )
        _assign[(blocks, k)](
            expert_indices, order, mask, counts, totals, token_counts, offsets, choice_of_row, row_of_choice,
            num_tokens, tiles, blocks, _float64_bits(capacity_factor * k) if limited else None,
            BLOCK_B=_MAX_BLOCKS, **sizes, **_OPTIONS,
        )  # fmt: skip
    return offsets, choice_of_row, row_of_choice


def _float64_bits(value: float) -> int:
    """The bits of a positive float64 as an int, which is passed unchanged; a float would be rounded to float32.

    Subnormal numbers become the smallest normal one, so that the int always takes 64 bits.
    """
    return struct.unpack("<q", struct.pack("<d", max(value, sys.float_info.min)))[0]


def variants(arch: int) -> Iterator[Variant]:
    """The kernels for 8, 64 and 256 experts; other numbers of experts and choices differ in constants."""
    types = dict.fromkeys(("expert_indices", "counts", "token_counts", "places", "totals", "offsets"), "*i32")
    types |= {"choice_of_row": "*i32", "row_of_choice": "*i32", "order": "*i64", "mask": "*u8"}
    types |= dict.fromkeys(("T", "tiles", "blocks", "rows"), "i32") | {"factor_bits": "i64"}

    def variant(name, kernel, **constants) -> Variant:
        return Variant(name, kernel, signature(kernel, types, constants), constants, _OPTIONS)

    for num_experts, k in ((8, 2), (64, 8), (256, 8)):
        sizes, name = {"E": num_experts, "K": k, **_blocks(num_experts)}, f"E={num_experts} K={k}"
        yield variant(f"dispatch_count {name}", _count, COUNT_TOKENS=True, **sizes)
        yield variant(f"dispatch_assign {name}", _assign, BLOCK_B=_MAX_BLOCKS, **sizes)
        yield variant(f"dispatch_scan {name}", _scan, E=num_experts, BLOCK_R=_SCAN_ROWS, BLOCK_E=_SCAN_EXPERTS)
    plain = {"order": None, "mask": None, "E": 8, "K": 2, **_blocks(8)}
    yield variant("dispatch_count dropless", _count, COUNT_TOKENS=False, **plain)
    yield variant("dispatch_assign dropless", _assign, factor_bits=None, BLOCK_B=_MAX_BLOCKS, **plain)
