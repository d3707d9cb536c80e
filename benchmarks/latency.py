"""One image, one caption: how long a call takes on a CPU, as a server with one request at a time sees it.

Models take turns, one call each a round, so that no model finds its weights in the cache. "accelerated" and "int8" are
``clipup.accelerate``; dense models run on other engines too, where these are installed (engines.py). At the end: one
token through one small layer, where the calls are all that takes time.

    python benchmarks/latency.py                                      # bfloat16, a few minutes
    python benchmarks/latency.py --rounds 300 --csv benchmarks/results/latency_cpu.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from operator import truediv
from statistics import median, quantiles

import torch
from clip_throughput import ACCELERATED, BASELINE, INT8, LARGE, WORDS, build
from engines import ENGINES, left_out
from harness import DTYPES, clock, commit, number, on_device, run
from torch import nn

import clipup
from clipup.models.tokenizers import get_tokenizer

MODELS = (
    BASELINE, f"{BASELINE} {ACCELERATED}", f"{BASELINE} {INT8}", *(f"{BASELINE} {engine}" for engine in ENGINES),
    f"{BASELINE} CLIP-UP", f"{BASELINE} CLIP-UP {ACCELERATED}", f"{BASELINE} CLIP-UP {INT8}", LARGE,
)  # fmt: skip


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` of each, after two untimed ones."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            taken[name].append(clock(call, "cpu"))
    return {name: seconds[2:] for name, seconds in taken.items()}


def rows_of(what: str, calls: dict[str, Callable[[], object]], rounds: int, args: argparse.Namespace) -> list[dict]:
    """A row for every model; the ratio is the median over rounds of its time over the first model's."""
    taken = in_turn(calls, rounds)
    first = next(iter(taken.values()), [])
    return [
        {
            **on_device(args, args.dtype), "input": what, "model": name, "p50_ms": f"{median(seconds) * 1e3:.3f}",
            "p99_ms": f"{quantiles(seconds, n=100, method='inclusive')[98] * 1e3:.3f}",
            "ratio_to_first": f"{median(map(truediv, seconds, first)):.3f}", "rounds": rounds,
            "commit": commit(), "torch": torch.__version__,
        }
        for name, seconds in taken.items()
    ]  # fmt: skip


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Small layers, whose arithmetic takes a few microseconds."""
    torch.manual_seed(0)
    sparse = clipup.SparseMoE(64, 64, num_experts=8, top_k=2, eval_capacity_factor=2.0, dtype=dtype).eval()
    dense = nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.GELU(), nn.Linear(64, 64, dtype=dtype)).eval()
    prepared = {
        name: clipup.accelerate(sparse, weights=weights) for name, weights in ((ACCELERATED, None), (INT8, INT8))
    }
    return {"dense MLP": dense, "SparseMoE": sparse} | {f"SparseMoE {name}": layer for name, layer in prepared.items()}


def measure(args: argparse.Namespace) -> list[dict]:
    lacking = left_out(args.models)
    args.models = [name for name in args.models if name not in lacking]
    dtype = DTYPES[args.dtype]
    texts = get_tokenizer(BASELINE)([" ".join(WORDS[:12])])
    built = {name: build(name, dtype, texts, threads=args.threads) for name in args.models}
    token = torch.randn(1, 64).to(dtype)
    with torch.inference_mode():
        of_images = {name: partial(model.encode_image, image) for name, (model, _, image) in built.items()}
        of_texts = {name: partial(model.encode_text, texts) for name, (model, _, _) in built.items()}
        rows = [
            *rows_of("image", of_images, args.rounds, args),
            *rows_of("caption", of_texts, args.rounds, args),
        ]
        of_token = {name: partial(layer, token) for name, layer in layers(dtype).items()}
        in_turn(of_token, 200)  # nothing that happens once: imports, choice of backends
        return rows + rows_of("token", of_token, 20 * args.rounds, args)


def main(argv: list[str] | None = None) -> int:
    options = {
        "--models": {"nargs": "*", "choices": MODELS, "default": list(MODELS), "help": "(default: all)"},
        "--dtype": {"choices": list(DTYPES), "default": "bf16", "help": "(default: bf16)"},
        "--rounds": number(100, "timed calls of every model"),
        "--threads": number(torch.get_num_threads(), "CPU threads"),
    }
    note = "models take turns, one call each a round"
    return run(argv, __doc__, options, measure, "input model p50_ms p99_ms ratio_to_first", note)


if __name__ == "__main__":
    raise SystemExit(main())
