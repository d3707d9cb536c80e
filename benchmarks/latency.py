"""One image, one caption: how long a call takes on a CPU, as a server with one request at a time sees it.

Models take turns, one call each a round, so that no model finds its weights in the cache. "accelerated" and "int8" are
``clipup.accelerate``; "onnxruntime" is the dense model in int8 there, where it is installed (peers.py). At the end:
one token through one small layer, where the calls are all that takes time.

    python benchmarks/latency.py                                      # bfloat16, a few minutes
    python benchmarks/latency.py --rounds 300 --csv benchmarks/results/latency_cpu.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from clip_throughput import ACCELERATED, BASELINE, INT8, LARGE, WORDS, build
from harness import DTYPES, commit, report
from peers import ONNX, ONNX_PACKAGES, missing
from torch import nn

import clipup
from clipup.models.tokenizers import get_tokenizer
from clipup_kernels.machine import processor_name

MODELS = (
    BASELINE, f"{BASELINE} {ACCELERATED}", f"{BASELINE} {INT8}", f"{BASELINE} {ONNX}", f"{BASELINE} CLIP-UP",
    f"{BASELINE} CLIP-UP {ACCELERATED}", f"{BASELINE} CLIP-UP {INT8}", LARGE,
)  # fmt: skip
COLUMNS = "input model p50_ms p99_ms ratio_to_first"


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` of each, after two untimed ones."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 2:
                taken[name].append(time.perf_counter() - start)
    return taken


def rows_of(what: str, taken: dict[str, list[float]], args: argparse.Namespace) -> list[dict]:
    """A row for every model; the ratio is the median over rounds of its time over the first model's."""
    rows = []
    first = next(iter(taken.values()))
    for name, seconds in taken.items():
        p99 = quantiles(seconds, n=100, method="inclusive")[98]
        ratio = median(mine / base for mine, base in zip(seconds, first, strict=True))
        rows.append(
            {
                "device": processor_name("cpu"), "dtype": args.dtype, "threads": args.threads, "input": what,
                "model": name, "p50_ms": f"{median(seconds) * 1e3:.3f}", "p99_ms": f"{p99 * 1e3:.3f}",
                "ratio_to_first": f"{ratio:.3f}", "rounds": len(seconds), "commit": commit(),
                "torch": torch.__version__,
            }
        )  # fmt: skip
    return rows


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Small layers, whose arithmetic takes a few microseconds."""
    torch.manual_seed(0)
    sparse = clipup.SparseMoE(64, 64, num_experts=8, top_k=2, eval_capacity_factor=2.0, dtype=dtype).eval()
    dense = nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.GELU(), nn.Linear(64, 64, dtype=dtype)).eval()
    prepared = {
        name: clipup.accelerate(sparse, weights=weights) for name, weights in ((ACCELERATED, None), (INT8, INT8))
    }
    return {"dense MLP": dense, "SparseMoE": sparse} | {f"SparseMoE {name}": one for name, one in prepared.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of every model (default: 100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--csv", help="file to write the rows to")
    args = parser.parse_args(argv)
    if args.rounds < 10:
        parser.error(f"--rounds must be 10 or more, got {args.rounds}")
    torch.set_num_threads(args.threads)
    if (lacking := missing(ONNX_PACKAGES)) and any(name.endswith(ONNX) for name in args.models):
        print(f"left out {ONNX}: pip install {' '.join(lacking)}", file=sys.stderr)
        args.models = [name for name in args.models if not name.endswith(ONNX)]

    dtype = DTYPES[args.dtype]
    texts = get_tokenizer(BASELINE)([" ".join(WORDS[:12])])
    models, images = {}, {}
    for name in args.models:
        models[name], _, images[name] = build(name, dtype, texts, threads=args.threads)
        print(f"made {name}", file=sys.stderr, flush=True)

    rows = []
    with torch.inference_mode():
        for what, calls in {
            "image": {name: lambda n=name: models[n].encode_image(images[n]) for name in models},
            "caption": {name: lambda n=name: models[n].encode_text(texts) for name in models},
        }.items():
            if calls:
                rows += rows_of(what, in_turn(calls, args.rounds), args)
        token = torch.randn(1, 64).to(dtype)
        calls = {name: lambda one=layer: one(token) for name, layer in layers(dtype).items()}
        for call in calls.values():  # nothing that happens once: imports, choice of backends
            for _ in range(200):
                call()
        rows += rows_of("token", in_turn(calls, 20 * args.rounds), args)
    report(rows, COLUMNS, args.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
