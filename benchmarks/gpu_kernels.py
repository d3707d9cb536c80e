"""Every launch of both passes timed by itself on a GPU, beside its prediction and the ceilings of the same run.

    python benchmarks/gpu_kernels.py --csv runs/gpu_kernels.csv

Times are medians, between two events, with an empty second-level cache. ``predicted_ms`` is ``gpu_model.py``'s, with
the rate of the second-level cache that was measured here. Ceilings: a copy in memory, reads of 12 MiB that stay in the
second-level cache, torch's product of 8,192 x 8,192 matrices, and its products on as many rows as the layer has. A
launch that fails is left out by name. The file is written again after every launch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import NamedTuple

import gpu_model
import torch
import triton
import triton.language as tl
from harness import DTYPES, begin_on_gpu, clock, gpu_options, print_table, tell, write_csv

from clipup_kernels.triton import (
    configs,
    dispatch,
    expert_mlp,
    expert_mlp_backward,
    router_logits,
    rows,
    topk_gating,
    weight_gradient,
)
from clipup_kernels.triton.grouped_linear import project_rows
from clipup_kernels.triton.launch import ceil_div

COLUMNS = "launch ms p20_ms p80_ms gflop tflops mbyte gbytes_per_s predicted_ms measured_to_predicted"
CACHED_BYTES, PASSES = 12 << 20, 256
"""An H100's cache has two parts of 25 MiB, and each multiprocessor may read through its own: half of a part, so that it
surely stays. So many passes that the first one, from memory, is 1% of the time."""


class Launch(NamedTuple):
    """Something that is timed."""

    name: str
    flops: float
    bytes: float
    """From and to memory; for the ceiling of the second-level cache, from there."""
    run: Callable[[], object]


@triton.jit
def _read(buffer, sums, blocks, passes, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(passes):
        block = (tl.program_id(0) + number * tl.num_programs(0)) % blocks
        total += tl.load(buffer + block * BLOCK + place)
    tl.store(sums + tl.program_id(0) * BLOCK + place, total)


def ceilings(device: str, dtype: torch.dtype, size: int = 8192, copied: int = 1 << 30) -> Iterator[Launch]:
    """What the card can do at its best."""
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    yield Launch("copy", 0, 2 * copied, lambda: target.copy_(source))
    block = 4096
    blocks = min(CACHED_BYTES, copied) // (4 * block)
    buffer, programs = source[: blocks * block], 8 * gpu_model.MULTIPROCESSORS if device == "cuda" else 2
    sums = torch.empty(programs * block, device=device)
    read = 4.0 * block * programs * PASSES
    yield Launch("L2 read", 0, read, lambda: _read[(programs,)](buffer, sums, blocks, PASSES, BLOCK=block, num_warps=8))
    square = torch.randn(size, size, device=device).to(dtype)
    yield Launch(f"torch {size}^3", 2 * size**3, 6 * size**2, lambda: square @ square)


def launches(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, device: str
) -> Iterator[Launch]:  # fmt: skip
    """The launches of a forward and a backward pass, those of an op together, and torch's products on as many rows."""

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    num_rows, size = tokens * top_k, dtype.itemsize
    x, dy = randn(tokens, width), randn(tokens, width)
    in_weight, out_weight = randn(experts, hidden, width) / width**0.5, randn(experts, width, hidden) / hidden**0.5
    in_bias, out_bias = randn(experts, hidden), randn(experts, width)
    router, logits = torch.randn(experts, width, device=device), torch.randn(tokens, experts, device=device)
    gates, indices, *_ = topk_gating.topk_gating(logits, top_k, True)
    plan = offsets, choice_of_row, row_of_choice = dispatch.dispatch(indices, experts)
    flops, weight = 2.0 * num_rows * width * hidden, size * experts * width * hidden
    narrow, wide, token_rows = size * num_rows * width, size * num_rows * hidden, size * tokens * width

    def project_in(keep_z: bool) -> tuple:
        return expert_mlp.project_in(
            x, offsets, choice_of_row, top_k, in_weight, in_bias, None, None, "gelu", keep_z=keep_z, keep_a=True
        )

    def project_back() -> tuple:
        return expert_mlp_backward.project_back(
            dy, gates, offsets, choice_of_row, out_weight, z_and_a()[0], "gelu", need_dz=True, need_a=True,
            need_parts=True,
        )  # fmt: skip

    # What launches read of others, made in the untimed call of the first: a launch that fails takes only those with it
    # that need its results.
    z_and_a = functools.cache(lambda: project_in(True))
    out = functools.cache(lambda: project_rows(z_and_a()[1], out_weight, out_bias, offsets))
    back = functools.cache(project_back)
    d_rows = functools.cache(lambda: project_rows(back()[0], in_weight, None, offsets, transposed=True))
    tile = configs.choose("project_back", x.device, dtype, num_rows, experts, width, hidden)
    partial_sums = ceil_div(hidden, tile.block_n)
    routed = {move.name: move.bytes for move in gpu_model.moves(num_rows, width, hidden, experts, tokens, True)}

    def routing(name: str, run: Callable[[], object]) -> Launch:
        return Launch(name, 0, routed[name], run)

    yield routing("router_logits", lambda: router_logits.router_logits(x, router))
    yield routing("topk_gating", lambda: topk_gating.topk_gating(logits, top_k, True))
    yield routing("dispatch", lambda: dispatch.dispatch(indices, experts))
    yield Launch("project_in", flops, narrow + weight + wide, lambda: project_in(False))
    yield Launch("project_in, z kept", flops, narrow + weight + 2 * wide, lambda: project_in(True))
    yield Launch(
        "project_rows", flops, wide + weight + narrow,
        lambda: project_rows(z_and_a()[1], out_weight, out_bias, offsets),
    )  # fmt: skip
    yield Launch("combine", 0, narrow + token_rows, lambda: rows.combine(out(), gates, *plan))
    yield Launch("project_back", flops, narrow + weight + 3 * wide, project_back)
    yield Launch(
        "gate_gradient", 0, 4 * num_rows * partial_sums + token_rows,
        lambda: expert_mlp_backward.gate_gradient(back()[2], dy, out_bias, offsets, row_of_choice),
    )  # fmt: skip
    yield Launch(
        "expert_gradients", 2 * flops, 2 * (narrow + wide + weight),
        lambda: weight_gradient.expert_gradients(
            back()[0], x, dy, back()[1], gates, offsets, choice_of_row, in_bias=True, out_bias=True
        ),
    )  # fmt: skip
    yield Launch(
        "project_rows, dx", flops, wide + weight + narrow,
        lambda: project_rows(back()[0], in_weight, None, offsets, transposed=True),
    )  # fmt: skip
    yield Launch("gather_sum", 0, narrow + token_rows, lambda: rows.gather_sum(d_rows(), row_of_choice))
    yield routing(
        "topk_gating_backward", lambda: topk_gating.topk_gating_backward(logits, indices, True, None, gates)
    )  # fmt: skip
    yield routing(
        "router_logits_backward", lambda: router_logits.router_logits_backward(logits, x, router, None, [True, True])
    )  # fmt: skip
    yield routing("sum of x's gradients", lambda: dy.add_(x))
    left, right, back_right = randn(num_rows, width), in_weight[0].mT, in_weight[0]
    yield Launch("torch, in", flops, narrow + weight / experts + wide, lambda: left @ right)
    yield Launch("torch, out", flops, narrow + weight / experts + wide, lambda: z_and_a()[1] @ back_right)


def predictions(tokens: int, width: int, hidden: int, experts: int, top_k: int, l2: float) -> dict[str, float]:
    """Milliseconds by launch, for bfloat16."""
    layer = tokens * top_k, width, hidden
    found = {}
    for training, suffix in ((False, ""), (True, ", z kept")):
        for product in gpu_model.products(*layer, experts, training):
            name = product.name + (suffix if product.name == "project_in" else "")
            found[name] = gpu_model.predict(product, l2).total
        found |= {move.name: move.milliseconds for move in gpu_model.moves(*layer, experts, tokens, training)}
    return found


def measure(launch: Launch, device: str, repetitions: int) -> dict[str, object]:
    """A row of the table, without its prediction."""
    for _ in range(3):
        launch.run()
    times = sorted(1e3 * clock(launch.run, device) for _ in range(repetitions))
    ms = median(times)
    fifth = repetitions // 5
    return {
        "launch": launch.name, "ms": f"{ms:.4f}", "p20_ms": f"{times[fifth]:.4f}", "p80_ms": f"{times[-1 - fifth]:.4f}",
        "gflop": f"{launch.flops / 1e9:.0f}", "tflops": f"{launch.flops / ms / 1e9:.0f}",
        "mbyte": f"{launch.bytes / 1e6:.0f}", "gbytes_per_s": f"{launch.bytes / ms / 1e6:.0f}",
        "predicted_ms": "", "measured_to_predicted": "",
    }  # fmt: skip


def measure_all(
    found: Iterable[Launch], device: str, repetitions: int, keep: Callable[[dict[str, object]], None]
) -> int:
    """Hands the row of every launch to ``keep`` as soon as it is measured, names those that fail, and counts them."""
    failures = 0
    for launch in found:
        try:
            row = measure(launch, device, repetitions)
        except Exception as failure:  # a compiler's or a driver's, of many kinds
            failures += 1
            tell(launch.name, failure)
            continue
        print(f"{launch.name}: {row['ms']} ms", flush=True)
        keep(row)
    return failures


def predict_on_this_card(layer: tuple[int, int, int, int, int], rows: list[dict[str, object]]) -> dict[str, float]:
    """``predictions`` at the rate of the second-level cache among the ceilings' rows; empty on a card without a model,
    and, with words, where that rate or the machine code is missing."""
    card = torch.cuda.get_device_properties(0)
    if (card.major, card.multi_processor_count) != (9, gpu_model.MULTIPROCESSORS):
        return {}
    try:
        l2 = next(float(str(row["gbytes_per_s"])) for row in rows if row["launch"] == "L2 read") * 1e9
        return predictions(*layer, l2)
    except Exception as failure:  # StopIteration, and the compiler's and its tools' own
        tell("predictions", failure)
        return {}


def main(argv: list[str] | None = None) -> int:
    parser = gpu_options(__doc__)
    for name, default in (("tokens", 50_000), ("width", 768), ("hidden", 3072), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--repetitions", type=int, default=30, help="(default 30)")
    options = parser.parse_args(argv)
    layer = options.tokens, options.width, options.hidden, options.experts, options.top_k
    dtype = DTYPES[options.dtype]
    shape = f"{options.tokens}x{options.width}x{options.hidden}, {options.experts} experts, top {options.top_k}"
    about = begin_on_gpu(options, shape)
    table: list[dict[str, object]] = []
    predicted: dict[str, float] = {}

    def keep(row: dict[str, object]) -> None:
        name = str(row["launch"])
        if name in predicted:
            row["predicted_ms"] = f"{predicted[name]:.4f}"
            row["measured_to_predicted"] = f"{float(str(row['ms'])) / predicted[name]:.2f}"
        table.append(row | about)
        if options.csv:
            write_csv(options.csv, table)

    failures = measure_all(ceilings("cuda", dtype), "cuda", options.repetitions, keep)
    predicted |= predict_on_this_card(layer, table)
    failures += measure_all(launches(*layer, dtype, "cuda"), "cuda", options.repetitions, keep)
    print_table(table, COLUMNS.split())
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
