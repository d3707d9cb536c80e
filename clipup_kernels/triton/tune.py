"""Measures tiles for the grouped products of a layer on this machine's GPU and adds the best ones to the table.

    python -m clipup_kernels.triton.tune --width 768 --hidden 3072 --experts 8 --top-k 2 --tokens 1024 50000

Up to 32 tiles per product are compiled in parallel, compared with the usual one on few tokens, and those that agree are
timed on all. ``configs.py`` says where the table is stored and when it is read.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton

from . import (
    configs,
    dispatch,
    expert_mlp,
    expert_mlp_backward,
    grouped_linear,
    topk_gating,
    weight_gradient,
)
from .configs import Config
from .variants import SHARED_BYTES

_NOISE = 0.02

_CHECKED_TOKENS = 1000
_TOLERANCES = {"half": 2e-2, "tf32": 5e-3, "ieee": 1e-4}
"""Largest difference between the results of two tiles, as a share of the largest entry."""

# block_m, block_n, block_k, warps, stages, chosen by hand: the usual tile's neighbors in each size, and smaller ones
# for few rows. What does not fit an architecture's shared memory is left out for it.
_TILES = {
    "half": (
        (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
        (64, 256, 64, 4, 3), (64, 256, 64, 8, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 128, 32, 8, 4),
    ),
    "tf32": (
        (64, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 4, 3),
        (128, 64, 32, 8, 3), (128, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (128, 128, 16, 8, 3),
        (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (64, 64, 64, 4, 3), (64, 32, 32, 4, 4),
    ),
    "ieee": (
        (64, 64, 16, 8, 2), (64, 64, 16, 4, 2), (64, 64, 32, 8, 2), (64, 64, 16, 8, 3), (64, 64, 16, 8, 4),
        (128, 64, 16, 8, 2), (64, 128, 16, 8, 2), (128, 128, 16, 8, 2), (32, 64, 16, 4, 2), (64, 32, 16, 4, 2),
        (32, 32, 32, 4, 2), (32, 128, 16, 8, 2),
    ),
}  # fmt: skip
_TILES_80 = (  # two blocks of these share the 99 KB of a consumer variant, or the 163 KB of a data-center one
    (128, 128, 32, 4, 3), (128, 128, 32, 4, 4), (128, 128, 32, 8, 3), (128, 256, 32, 8, 3), (256, 128, 32, 8, 3),
    (64, 256, 32, 4, 3), (64, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4),
)  # fmt: skip


class Product(NamedTuple):
    """A product of a layer that is tuned."""

    kernel: str
    depth: int
    columns: int
    launch: Callable[[Config], tuple[torch.Tensor | None, ...]]
    """Its results, the same for every tile up to rounding."""


def candidates(arch: int, kernel: str, kind: str, depth: int, columns: int) -> Iterator[Config]:
    """The tiles to be measured: at most 32, whose operands fit into shared memory and whose sums take up to 128
    registers per thread.

    If the architecture has descriptors and the sizes are multiples of the tile's, each also with weights by
    descriptors.
    """
    tiles = _TILES[kind] + (_TILES_80 if (arch, kind) == (80, "half") else ())
    for tile in tiles:
        config = Config(*tile)
        operands = (config.block_m + config.block_n) * config.block_k * config.num_stages * (2 if kind == "half" else 4)
        sums = config.block_m * config.block_n // (32 * config.num_warps)
        if kernel == "project_in_gated":  # two sums of products instead of one
            config = config._replace(block_n=config.block_n // 2)
        if operands <= SHARED_BYTES[arch] and sums <= 128:
            yield config
            even = depth % config.block_k == 0 and columns % config.block_n == 0
            if arch >= 90 and even and kernel not in configs.GRADIENTS:
                yield config._replace(descriptors=True)


def products(
    width: int, hidden: int, num_experts: int, top_k: int, num_tokens: int, dtype: torch.dtype, device: str, gated: bool
) -> Iterator[Product]:
    """Kernel, depth, columns and launch of every product of a training step."""

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

    yield Product(
        "project_in_gated" if gated else "project_in", width, hidden,
        lambda config: expert_mlp.project_in(*in_arguments, keep_z=True, keep_a=True, config=config),
    )  # fmt: skip
    yield Product(
        "project_rows", hidden, width,
        lambda config: (grouped_linear.project_rows(a, out_weight, out_bias, offsets, config=config),),
    )  # fmt: skip

    def back(config: Config) -> tuple[torch.Tensor | None, ...]:
        dz, scaled_a, parts = expert_mlp_backward.project_back(
            *back_arguments, need_dz=True, need_a=True, need_parts=True, config=config
        )
        return dz, scaled_a, parts.sum(1)  # their number depends on the tile

    yield Product("project_back", width, hidden, back)
    dz = z if gated else z.unsqueeze(0)  # of its shape
    other = (dz[1], gate_weight) if gated else None
    yield Product(
        "project_rows_transposed", hidden, width,
        lambda config: (
            grouped_linear.project_rows(
                dz[0], in_weight, None, offsets, transposed=True, other=other, config=config
            ),
        ),
    )  # fmt: skip
    yield Product(
        "expert_gradients", hidden, width,
        lambda config: tuple(
            weight_gradient.expert_gradients(
                z, x, dy, a, gates, offsets, choice_of_row, in_bias=True, out_bias=True, config=config
            )
        ),
    )  # fmt: skip
    yield Product(
        "weight_gradient", hidden, width,
        lambda config: weight_gradient.weight_gradient(a, x, offsets, gather_right=True, config=config, **gathered),
    )  # fmt: skip
    yield Product(
        "weight_gradient", width, hidden,
        lambda config: weight_gradient.weight_gradient(
            dy, a, offsets, gather_left=True, gates=gates, config=config, **gathered
        ),
    )  # fmt: skip


def usable(product: Product, tiles: Iterable[Config], kind: str, threads: int) -> list[Config]:
    """The first of ``tiles``, and those whose results agree with it. The others are named, except for those that do not
    fit this GPU: one tile that does not compile must not end the measurement.

    Every tile is compiled and launched once, in ``threads`` threads.
    """
    first, *others = dict.fromkeys(tiles)
    expected = product.launch(first)

    def fault(tile: Config) -> str | None:
        try:
            error = max(map(_difference, product.launch(tile), expected))
        except triton.runtime.errors.OutOfResources:
            return ""
        except Exception as failure:  # the compiler's own, of many kinds
            return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        return None if error <= _TOLERANCES[kind] else f"its results differ by {error:.1e} of the largest"

    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(fault, others))
    kept = [first]
    for tile, words in zip(others, faults, strict=True):
        if words is None:
            kept.append(tile)
        elif words:
            print(f"left out: {product.kernel}: {tile}: {words}", flush=True)
    return kept


def _difference(result: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    if result is None or expected is None:
        return 0.0 if result is expected else float("inf")
    difference = (result.float() - expected.float()).abs().max() / expected.float().abs().max()
    return difference.item() if difference.isfinite() else float("inf")


def fastest(
    launch: Callable[[Config], object], tiles: Iterable[Config],
    milliseconds: Callable[[Callable[[], object]], float],
) -> tuple[Config, dict[Config, float]]:  # fmt: skip
    """The first of ``tiles``, or the fastest if it is faster by more than noise; and the time of each."""
    times = {tile: milliseconds(lambda tile=tile: launch(tile)) for tile in tiles}
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return (best if times[best] <= (1 - _NOISE) * times[first] else first), times


def tune_layer(
    layer: tuple[int, int, int, int], sizes: dict[str, int], dtype: torch.dtype, device: torch.device, gated: bool,
    milliseconds: Callable[[Callable[[], object]], float], threads: int,
) -> None:  # fmt: skip
    """Measures every product of a layer and stores the best configs, each as soon as it is known.

    Args:
        layer: D, H, E, K.
        sizes: T by class of rows per expert.
        milliseconds: measures a launch.
        threads: how many tiles are compiled at once.
    """
    configs.store({})  # a table that cannot be written is an error now, not after minutes
    arch, kind = configs.architecture(device), configs.arithmetic(dtype)
    tiles: dict[tuple[str, int, int], list[Config]] = {}

    def usual(product: Product, bucket: str) -> Config:
        return configs.heuristic(arch, product.kernel, kind, bucket, product.depth, product.columns)

    for product in products(*layer, min(_CHECKED_TOKENS, *sizes.values()), dtype, str(device), gated):
        possible = candidates(arch, product.kernel, kind, product.depth, product.columns)
        first = [usual(product, bucket) for bucket in sizes]
        tiles[product[:3]] = usable(product, [*first, *possible], kind, threads)
    for bucket, tokens in sizes.items():
        for product in products(*layer, tokens, dtype, str(device), gated):
            default = usual(product, bucket)
            best, times = fastest(product.launch, dict.fromkeys([default, *tiles[product[:3]]]), milliseconds)
            path = configs.store(
                {configs.entry_name(arch, product.kernel, kind, bucket, product.depth, product.columns): best}
            )
            print(
                f"{product.kernel} {product.depth}x{product.columns}, {tokens} tokens: {times[default]:.3f} ms with "
                f"{tuple(default)}, {times[best]:.3f} ms with {tuple(best)}, the fastest of {len(times)} -> {path}",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("hidden", 3072), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 50000],
        help="tokens of a step, one number for each class of rows per expert (default 1024 50000)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gated", action="store_true", help="experts with a gate projection")
    options = parser.parse_args(arguments)
    sizes = {configs.bucket_of(number * options.top_k, options.experts): number for number in options.tokens}
    if len(sizes) < len(options.tokens):
        parser.error(
            f"--tokens: got {options.tokens}; some fall into the same class of rows per expert "
            f"({configs.BUCKETS}); name one number of tokens for each class"
        )
    if not torch.cuda.is_available():
        parser.error("no CUDA device: tiles can only be measured on one")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)

    def milliseconds(run: Callable[[], object]) -> float:
        return statistics.median(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="all"))

    layer = (options.width, options.hidden, options.experts, options.top_k)
    tune_layer(layer, sizes, dtype, device, options.gated, milliseconds, os.cpu_count() or 1)


if __name__ == "__main__":
    main()
