"""Every launch of both passes timed by itself on a GPU, beside its prediction and the ceilings of the same run.

    python benchmarks/gpu_kernels.py --csv runs/gpu_kernels.csv

Times are medians, between two events, with an empty second-level cache. ``predicted_ms`` is ``gpu_model.py``'s, with
the rates of memory and of the second-level cache that were measured here. Ceilings: a copy in memory, reads of 12 MiB
that stay in the second-level cache, torch's product of 8,192 x 8,192 matrices, and its products on as many rows as the
layer has. Where QuACK is installed, its launches for ``project_in`` and ``project_back`` are beside them. A launch that
fails is left out by name. The file is written again after every launch.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import gpu_model
import peers
import torch
import triton
import triton.language as tl
from grouped_peers import quack_back, quack_in
from harness import DTYPES, ON_GPU, GpuTable, clock, number, parser, print_table, timing

from clipup_kernels.triton import dispatch, expert_mlp, expert_mlp_backward, router_logits, rows, topk_gating
from clipup_kernels.triton.grouped_linear import project_rows
from clipup_kernels.triton.weight_gradient import expert_gradients

COLUMNS = "launch ms p20_ms p80_ms gflop tflops mbyte gbytes_per_s predicted_ms measured_to_predicted"
CACHED_BYTES, PASSES = 12 << 20, 256
"""An H100's cache has two parts of 25 MiB, and each multiprocessor may read through its own: half of a part, so that it
surely stays. So many passes that the first one, from memory, is 1% of the time."""

WARM_UP_SECONDS = 0.05
"""Before a launch is timed: while it is compiled, the GPU lowers its clock."""


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
    for step in range(passes):
        block = (tl.program_id(0) + step * tl.num_programs(0)) % blocks
        total += tl.load(buffer + block * BLOCK + place, cache_modifier=".cg")  # not from the first-level cache
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


def layer_tensors(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, device: str
) -> SimpleNamespace:
    """A layer's parameters and routing, and the gradient ``dy``; ``routed`` are the arguments of both passes."""

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, in_bias, out_bias = randn(tokens, width), randn(experts, hidden), randn(experts, width)
    in_weight, out_weight = randn(experts, hidden, width) / width**0.5, randn(experts, width, hidden) / hidden**0.5
    router, logits = torch.randn(experts, width, device=device), torch.randn(tokens, experts, device=device)
    gates, indices, *_ = topk_gating.topk_gating(logits, top_k, True)
    plan = dispatch.dispatch(indices, experts)
    return SimpleNamespace(
        x=x, dy=randn(tokens, width), router=router, logits=logits, gates=gates, indices=indices, plan=plan,
        in_weight=in_weight, in_bias=in_bias, out_weight=out_weight, out_bias=out_bias,
        routed=(x, gates, *plan, in_weight, in_bias, out_weight, out_bias, None, None),
    )  # fmt: skip


def launches(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, device: str
) -> Iterator[Launch]:  # fmt: skip
    """The launches of a forward and a backward pass, those of an op together, torch's products on as many rows, and
    QuACK's."""
    t = layer_tensors(tokens, width, hidden, experts, top_k, dtype, device)
    offsets, choice_of_row, row_of_choice = t.plan

    def project_in(keep_z: bool) -> tuple:
        return expert_mlp.project_in(
            t.x, offsets, choice_of_row, top_k, t.in_weight, t.in_bias, None, None, "gelu", keep_z=keep_z, keep_a=True
        )

    def project_back() -> tuple:
        return expert_mlp_backward.project_back(
            t.dy, t.gates, offsets, choice_of_row, t.out_weight, z_and_a()[0], "gelu", need_dz=True, need_a=True,
            need_parts=True,
        )  # fmt: skip

    def project_out() -> torch.Tensor:
        return project_rows(z_and_a()[1], t.out_weight, t.out_bias, offsets)

    def project_dx() -> torch.Tensor:
        return project_rows(back()[0], t.in_weight, None, offsets, transposed=True)

    # What launches read of others, made in the untimed call of the first: a launch that fails takes only those with it
    # that need its results.
    z_and_a = functools.cache(lambda: project_in(True))
    out, back, d_rows = map(functools.cache, (project_out, project_back, project_dx))
    runs: dict[str, Callable[[], object]] = {
        "router_logits": lambda: router_logits.router_logits(t.x, t.router),
        "topk_gating": lambda: topk_gating.topk_gating(t.logits, top_k, True),
        "dispatch": lambda: dispatch.dispatch(t.indices, experts),
        "project_in": lambda: project_in(False),
        "project_in, z kept": lambda: project_in(True),
        "project_rows": project_out,
        "combine": lambda: rows.combine(out(), t.gates, *t.plan),
        "project_back": project_back,
        "gate_gradient": lambda: expert_mlp_backward.gate_gradient(back()[2], t.dy, t.out_bias, offsets, row_of_choice),
        "expert_gradients": lambda: expert_gradients(
            back()[0], t.x, t.dy, back()[1], t.gates, offsets, choice_of_row, in_bias=True, out_bias=True
        ),
        "project_rows, dx": project_dx,
        "gather_sum": lambda: rows.gather_sum(d_rows(), row_of_choice),
        "topk_gating_backward": lambda: topk_gating.topk_gating_backward(t.logits, t.indices, True, None, t.gates),
        "router_logits_backward": lambda: router_logits.router_logits_backward(
            t.logits, t.x, t.router, None, [True, True]
        ),
        "sum of x's gradients": lambda: t.dy.add_(t.x),
    }
    modelled = modelled_launches(tokens, width, hidden, experts, top_k)
    for name, run in runs.items():
        yield Launch(name, modelled[name].flops, modelled[name].bytes, run)
    left, in_weight = torch.randn(tokens * top_k, width, device=device).to(dtype), t.in_weight[0]
    flops, moved = modelled["project_in"].flops, 2 * (tokens * top_k * (width + hidden) + width * hidden)
    yield Launch("torch, in", flops, moved, lambda: left @ in_weight.mT)
    yield Launch("torch, out", flops, moved, lambda: z_and_a()[1] @ in_weight)
    if not peers.missing(["quack"]):
        token_of_row, gate_of_row = choice_of_row // top_k, t.gates.flatten()[choice_of_row]
        shared = offsets, token_of_row
        for name, run in {
            "project_in, z kept": lambda: quack_in(t.x, t.in_weight, t.in_bias, *shared, keep_z=True),
            "project_back": lambda: quack_back(t.dy, t.out_weight, z_and_a()[0], gate_of_row, *shared),
        }.items():
            yield Launch(f"quack, {name}", modelled[name].flops, modelled[name].bytes, run)


def modelled_launches(*layer: int) -> dict[str, gpu_model.Launch]:
    """What gpu_model.py says of every launch of both passes."""
    return {launch.name: launch for training in (False, True) for launch in gpu_model.launches(*layer, training)}


def predictions(*layer: int, l2: float, dram: float = gpu_model.DRAM_BYTES) -> dict[str, float]:
    """Milliseconds by launch."""
    return {name: gpu_model.predict(launch, l2, dram).total for name, launch in modelled_launches(*layer).items()}


def row(launch: Launch, device: str, repetitions: int, predicted: dict[str, float]) -> dict[str, str]:
    """A row of the table but for the launch's name."""
    launch.run()  # compiles
    warm = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < warm:
        clock(launch.run, device)
    times = timing([clock(launch.run, device) for _ in range(repetitions)])
    ms, expected = times.median_ms, predicted.get(launch.name)
    return {
        "ms": f"{ms:.4f}", "p20_ms": f"{times.p20_ms:.4f}", "p80_ms": f"{times.p80_ms:.4f}",
        "gflop": f"{launch.flops / 1e9:.0f}", "tflops": f"{launch.flops / ms / 1e9:.0f}",
        "mbyte": f"{launch.bytes / 1e6:.0f}", "gbytes_per_s": f"{launch.bytes / ms / 1e6:.0f}",
        "predicted_ms": f"{expected:.4f}" if expected else "",
        "measured_to_predicted": f"{ms / expected:.2f}" if expected else "",
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = ON_GPU | gpu_model.LAYER | {"--repetitions": number(30, "of each launch")}
    args = parser(__doc__, options).parse_args(argv)
    layer, dtype = (args.tokens, args.width, args.hidden, args.experts, args.top_k), DTYPES[args.dtype]
    table = GpuTable(args, "{}x{}x{}, {} experts, top {}".format(*layer))
    predicted: dict[str, float] = {}

    def measure(launch: Launch) -> None:
        for fresh in table.measure(launch.name, lambda: [row(launch, "cuda", args.repetitions, predicted)]):
            print(f"{launch.name}: {fresh['ms']} ms", flush=True)

    for ceiling in ceilings("cuda", dtype):
        measure(ceiling)
    rates = {row["launch"]: float(row["gbytes_per_s"]) * 1e9 for row in table.rows}
    card = torch.cuda.get_device_properties(0)
    if {"copy", "L2 read"} <= rates.keys() and (card.major, card.multi_processor_count) == (
        9,
        gpu_model.MULTIPROCESSORS,
    ):
        predicted |= predictions(*layer, l2=rates["L2 read"], dram=rates["copy"])
    for launch in launches(*layer, dtype, "cuda"):
        measure(launch)
    print_table(table.rows, COLUMNS.split())
    return int(table.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
