"""Measures tiles for the grouped products of a layer on this machine's GPU and adds the best ones to the table.

    python -m clipup_kernels.triton.tune --width 768 --hidden 3072 --experts 8 --top-k 2 --tokens 4096 50000

A case takes some minutes, mostly for compiling. ``configs.py`` says where the table is stored and when it is read.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
import triton

from . import (
    configs,
    dispatch,
    expert_mlp,
    expert_mlp_backward,
    expert_mlp_inference,
    grouped_linear,
    topk_gating,
    variants,
    weight_gradient,
)
from .configs import Config

_NOISE = 0.02

SHARED_BYTES = variants.SHARED_BYTES | {80: 99 * 1024}
"""Shared memory per block, by architecture in the table; that of 80 also fits the consumer variants."""

Product = tuple[str, int, int, Callable[[Config | None], object]]


def candidates(arch: int, kernel: str, itemsize: int, depth: int, columns: int) -> Iterator[Config]:
    """Tiles whose operands fit into shared memory and whose sums take 32 to 128 registers per thread.

    Also with weights by descriptors, if the architecture has them and the sizes are multiples of the tile's.
    """
    for tile in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
        config = Config(*tile)
        outputs = config.block_n * (2 if kernel == "project_in_gated" else 1)
        operands = (config.block_m + outputs) * config.block_k * itemsize * config.num_stages
        sums = config.block_m * outputs // (32 * config.num_warps)
        if operands <= SHARED_BYTES[arch] and 32 <= sums <= 128:
            yield config
            even = depth % config.block_k == 0 and columns % config.block_n == 0
            if arch >= 90 and kernel != "weight_gradient" and even:
                yield config._replace(descriptors=True)


def candidates_both(arch: int, kernel: str, itemsize: int, width: int, hidden: int) -> Iterator[Config | None]:
    """Two launches, and tiles of ``project_both`` for 16-bit types that fit into shared memory and registers."""
    yield None
    columns = triton.next_power_of_2(max(width, 16))
    weights = 3 if kernel == "project_both_gated" else 2
    for block_m, block_n, num_warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (2, 3)):
        buffers = stages - 1 if arch == 80 else stages  # its tensor cores read the last operand from registers
        operands = (block_m + weights * block_n * buffers) * columns * itemsize
        fits = operands <= SHARED_BYTES[arch] and block_m * columns <= 128 * 32 * num_warps
        fits = fits and hidden % block_n == 0 and width % (512 if columns >= 512 else 16) == 0
        if itemsize == 2 and fits:
            yield Config(block_m, block_n, columns, num_warps, stages)


def persistent_forms(tile: Config) -> Iterator[Config]:
    """A tile with one block per tile, and with a few persistent blocks per multiprocessor."""
    yield tile
    for blocks in (1, 2, 4):
        yield tile._replace(persistent=blocks)


def products(
    width: int, hidden: int, num_experts: int, top_k: int, num_tokens: int, dtype: torch.dtype, device: str, gated: bool
) -> Iterator[Product]:
    """Kernel, depth, columns and launch of every product of a training step, and of ``project_both``."""

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    x, dy = randn(num_tokens, width), randn(num_tokens, width)
    in_weight, out_weight = randn(num_experts, hidden, width) / 8, randn(num_experts, width, hidden) / 8
    in_bias, out_bias = randn(num_experts, hidden), randn(num_experts, width)
    gate_weight, gate_bias = (in_weight, in_bias) if gated else (None, None)
    gates, expert_indices, *_ = topk_gating.topk_gating(
        torch.randn(num_tokens, num_experts, device=device), top_k, True
    )
    offsets, choice_of_row, _ = dispatch.dispatch(expert_indices, num_experts)
    in_arguments = (x, offsets, choice_of_row, top_k, in_weight, in_bias, gate_weight, gate_bias, "gelu")
    z, a = expert_mlp.project_in(*in_arguments, keep_z=True, keep_a=True)
    back_arguments = (dy, gates, offsets, choice_of_row, out_weight, z, "gelu")
    gathered = dict(choice_of_row=choice_of_row, top_k=top_k, need_bias=True)

    yield (
        "project_in_gated" if gated else "project_in", width, hidden,
        lambda config: expert_mlp.project_in(*in_arguments, keep_z=True, keep_a=True, config=config),
    )  # fmt: skip
    yield (
        "project_rows", hidden, width,
        lambda config: grouped_linear.project_rows(a, out_weight, out_bias, offsets, config=config),
    )  # fmt: skip
    yield (
        "project_back", width, hidden,
        lambda config: expert_mlp_backward.project_back(
            *back_arguments, need_dz=True, need_a=True, need_parts=True, config=config
        ),
    )  # fmt: skip
    yield (
        "weight_gradient", hidden, width,
        lambda config: weight_gradient.weight_gradient(a, x, offsets, gather_right=True, config=config, **gathered),
    )  # fmt: skip
    yield (
        "weight_gradient", width, hidden,
        lambda config: weight_gradient.weight_gradient(
            dy, a, offsets, gather_left=True, gates=gates, config=config, **gathered
        ),
    )  # fmt: skip

    def both(config: Config | None) -> torch.Tensor:
        if config is None:
            _, own_a = expert_mlp.project_in(*in_arguments, keep_z=False, keep_a=True)
            return grouped_linear.project_rows(own_a, out_weight, out_bias, offsets)
        return expert_mlp_inference.project_both(*in_arguments[:6], out_weight, out_bias, *in_arguments[6:], config)

    yield "project_both_gated" if gated else "project_both", width, hidden, both


def fastest(
    launch: Callable[[Config | None], object], tiles: Iterable[Config | None],
    milliseconds: Callable[[Callable[[], object]], float],
) -> tuple[Config | None, float]:  # fmt: skip
    """The first of ``tiles``, or the fastest if it is faster by more than noise; and its time.

    Tiles that do not fit this GPU are skipped.
    """
    times: dict[Config | None, float] = {}
    for tile in tiles:
        try:
            times[tile] = milliseconds(lambda tile=tile: launch(tile))
        except triton.runtime.errors.OutOfResources:
            continue
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    if times[best] > (1 - _NOISE) * times[first]:
        best = first
    return best, times[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("hidden", 3072), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 50000], help="tokens of a step")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gated", action="store_true", help="experts with a gate projection")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: tiles can only be measured on one")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    arch, kind = configs.architecture(device), configs.arithmetic(dtype)

    def milliseconds(run: Callable[[], object]) -> float:
        return statistics.median(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="all"))

    for tokens in options.tokens:
        layer = (options.width, options.hidden, options.experts, options.top_k)
        bucket = configs.bucket_of(tokens * options.top_k, options.experts)
        for kernel, depth, columns, launch in products(*layer, tokens, dtype, str(device), options.gated):
            name = configs.entry_name(arch, kernel, kind, bucket, depth, columns)
            usual = configs.heuristic(arch, kernel, kind, bucket, depth, columns)
            before = milliseconds(lambda launch=launch, usual=usual: launch(usual))
            if kernel in configs.BOTH_KERNELS:
                tiles = candidates_both(arch, kernel, dtype.itemsize, depth, columns)
                best, time = fastest(launch, [usual, *tiles], milliseconds)
            else:
                tiles = candidates(arch, kernel, dtype.itemsize, depth, columns)
                best, _ = fastest(launch, [usual, *tiles], milliseconds)
                best, time = fastest(launch, persistent_forms(best), milliseconds)
            path = configs.store({name: best})
            before_with, with_best = (tuple(tile) if tile else "two launches" for tile in (usual, best))
            print(f"{name}: {before:.3f} ms with {before_with}, {time:.3f} ms with {with_best} -> {path}", flush=True)


if __name__ == "__main__":
    main()
