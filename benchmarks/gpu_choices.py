"""Choices about the grouped products, each measured in turn with the usual one on a GPU.

    python benchmarks/gpu_choices.py --csv runs/gpu_choices.csv

For every product: another width of its tile, and weights by descriptors. Then gradients in one launch or two, and both
passes with all weights by descriptors. Tiles are compiled in parallel and compared with the usual one on few tokens;
those that fail, differ or do not fit have no time. ``ratio`` is the time over the usual choice's, the median of
pair-by-pair ratios: below 1 a choice is faster. docs/kernels.md says what follows from which figure. The file is
written again after every launch; one that fails is named, and the others are measured.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator

import torch
from harness import DTYPES, alternate, begin_on_gpu, gpu_options, print_table, tell, write_csv

from clipup_kernels.triton import configs, dispatch, expert_mlp, expert_mlp_backward, topk_gating, tune
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
    found = {USUAL: usual, f"{other.block_m}x{other.block_n}": other}
    if kernel not in configs.GRADIENTS:
        found["weights by descriptors"] = usual._replace(descriptors=True)
    return found


def comparisons(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str, threads: int
) -> Iterator[tuple[str, Prepare]]:
    """Every product and both passes, and what makes the choices: None for those that fail, whose results differ or
    that do not fit."""
    arch, kind = configs.architecture(torch.device(device)), configs.arithmetic(dtype)
    bucket = configs.bucket_of(tokens * layer[3], layer[2])
    few = {one[:3]: one for one in tune.products(*layer, min(1000, tokens), dtype, device, gated=False)}
    listed = list(tune.products(*layer, tokens, dtype, device, gated=False))

    def usual(product: tune.Product) -> Config:
        return configs.heuristic(arch, product.kernel, kind, bucket, product.depth, product.columns)

    of_one_weight = [functools.partial(one.launch, usual(one)) for one in listed if one.kernel == "weight_gradient"]

    def runs(product: tune.Product) -> dict[str, Run | None]:
        tiles = choices(product.kernel, usual(product))
        kept = tune.usable(few[product[:3]], tiles.values(), kind, threads)
        found: dict[str, Run | None] = {
            name: functools.partial(product.launch, tile) if tile in kept else None for name, tile in tiles.items()
        }
        if product.kernel == "expert_gradients":
            found["a launch for each weight"] = lambda: [launch() for launch in of_one_weight]
        return found

    for product in listed:
        if product.kernel != "weight_gradient":
            yield product.kernel, functools.partial(runs, product)
    yield "both passes", lambda: passes(layer, tokens, dtype, device)


def passes(layer: Layer, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Run | None]:
    """Both passes of the experts with the usual tiles, and with all weights by descriptors."""
    width, hidden, num_experts, top_k = layer

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, dy = randn(tokens, width), randn(tokens, width)
    weights = [randn(num_experts, hidden, width) / 8, randn(num_experts, hidden)]
    weights += [randn(num_experts, width, hidden) / 8, randn(num_experts, width)]
    gates, indices, *_ = topk_gating.topk_gating(torch.randn(tokens, num_experts, device=device), top_k, True)
    routed = (x, gates, *dispatch.dispatch(indices, num_experts), *weights, None, None)
    choose = configs.choose

    def run(descriptors: bool) -> None:
        def chosen(kernel: str, *which) -> Config:
            return choose(kernel, *which)._replace(descriptors=descriptors and kernel not in configs.GRADIENTS)

        configs.choose = chosen
        try:
            _, z = expert_mlp.expert_mlp_forward(*routed, "gelu", True)
            expert_mlp_backward.expert_mlp_backward(dy, *routed, z, "gelu", [True] * 4)
        finally:
            configs.choose = choose

    return {USUAL: lambda: run(False), "all weights by descriptors": lambda: run(True)}


def measure(runs: dict[str, Run | None], seconds: float, device: str, min_rounds: int = 5) -> list[dict[str, str]]:
    """A row for each choice, empty where it cannot run."""
    able = {name: run for name, run in runs.items() if run is not None}
    found = alternate(able, USUAL, seconds, device, min_rounds)
    rows = []
    for name in runs:
        times = [f"{value:.4f}" for value in found[name]] if name in found else ["left out", "", "", ""]
        rows.append({"choice": name} | dict(zip(("ms", "p20_ms", "p80_ms", "ratio"), times, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = gpu_options(__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="timing of one launch's choices (default 8)")
    options = parser.parse_args(argv)
    about = begin_on_gpu(options, "{}x{}x{}".format(TOKENS, *LAYER[:2]))
    layer = about.pop("layer")
    table, failures = [], 0
    for launch, prepare in comparisons(LAYER, TOKENS, DTYPES[options.dtype], "cuda", os.cpu_count() or 1):
        try:
            found = measure(prepare(), options.seconds, "cuda")
        except Exception as failure:  # a compiler's or a driver's, of many kinds
            tell(launch, failure)
            failures += 1
            continue
        fresh = [{"layer": layer, "launch": launch, **row, **about} for row in found]
        table += fresh
        print_table(fresh, COLUMNS.split())
        if options.csv:
            write_csv(options.csv, table)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
