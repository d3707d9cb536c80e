"""Choices about the grouped products, each measured in turn with the usual one on a GPU.

    python benchmarks/gpu_choices.py --csv runs/gpu_choices.csv

For every product: another width of its tile, and weights by descriptors. Then gradients in one launch or two. Tiles are
compiled in parallel and compared with the usual one on few tokens; those that fail, differ or do not fit have no time.
``ratio`` is the time over the usual choice's, the median of pair-by-pair ratios: below 1 a choice is faster.
docs/gpu_kernels.md says what follows from which figure. The file is written again after every launch; one that fails is
named, and the others are measured.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator

import torch
from harness import DTYPES, ON_GPU, GpuTable, alternate, number, parser, print_table

from clipup_kernels.triton import configs, tune
from clipup_kernels.triton.configs import Config

COLUMNS = "layer launch choice ms p20_ms p80_ms ratio"
USUAL = "usual"
Layer = tuple[int, int, int, int]
"""D, H, E, K."""
Run = Callable[[], object]
Prepare = Callable[[], dict[str, Run | None]]
"""Makes a launch's choices, the usual one first."""
LAYER, TOKENS = (768, 3072, 8, 2), 50_000


def choices(kernel: str, usual: Config) -> dict[str, Config]:
    """The tiles that are compared, the usual one first."""
    other = usual._replace(block_n=128 if usual.block_n == 256 else 2 * usual.block_n, num_warps=8)
    tiles = {USUAL: usual, f"{other.block_m}x{other.block_n}": other}
    if kernel not in configs.GRADIENTS:
        tiles["weights by descriptors"] = usual._replace(descriptors=True)
    return tiles


def comparisons(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str, threads: int
) -> Iterator[tuple[str, Prepare]]:
    """Every product, and what makes the choices: None for those that fail, whose results differ or that do not fit."""
    arch, kind = configs.architecture(torch.device(device)), configs.arithmetic(dtype)
    bucket = configs.bucket_of(tokens * layer[3], layer[2])
    few = {product[:3]: product for product in tune.products(*layer, min(1000, tokens), dtype, device, gated=False)}
    listed = list(tune.products(*layer, tokens, dtype, device, gated=False))

    def usual(product: tune.Product) -> Config:
        return configs.heuristic(arch, product.kernel, kind, bucket, product.depth, product.columns)

    of_one_weight = [
        functools.partial(product.launch, usual(product)) for product in listed if product.kernel == "weight_gradient"
    ]

    def runs(product: tune.Product) -> dict[str, Run | None]:
        tiles = choices(product.kernel, usual(product))
        kept = tune.usable(few[product[:3]], tiles.values(), kind, threads)
        of_choice: dict[str, Run | None] = {
            name: functools.partial(product.launch, tile) if tile in kept else None for name, tile in tiles.items()
        }
        if product.kernel == "expert_gradients":
            of_choice["a launch for each weight"] = lambda: [launch() for launch in of_one_weight]
        return of_choice

    for product in listed:
        if product.kernel != "weight_gradient":
            yield product.kernel, functools.partial(runs, product)


def measure(runs: dict[str, Run | None], seconds: float, device: str, min_rounds: int = 5) -> list[dict[str, str]]:
    """A row for each choice, empty where it cannot run."""
    able = {name: run for name, run in runs.items() if run is not None}
    timings = alternate(able, USUAL, seconds, device, min_rounds)
    times = {name: [f"{value:.4f}" for value in timing] for name, timing in timings.items()}
    columns, left_out = ("choice", "ms", "p20_ms", "p80_ms", "ratio"), ["left out", "", "", ""]
    return [dict(zip(columns, [name, *times.get(name, left_out)], strict=True)) for name in runs]


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__, ON_GPU | {"--seconds": number(8.0, "timing of one launch's choices")}).parse_args(argv)
    table = GpuTable(args, "{}x{}x{}".format(TOKENS, *LAYER[:2]))
    for launch, prepare in comparisons(LAYER, TOKENS, DTYPES[args.dtype], "cuda", os.cpu_count() or 1):
        table.measure(launch, lambda prepare=prepare: measure(prepare(), args.seconds, "cuda"))
    print_table(table.rows, COLUMNS.split())
    return int(table.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
