"""The share of the rate of packed int8 products that a whole image tower reaches in int8.

    python benchmarks/int8_share.py                                   # dense B/16 and CLIP-UP B/16, batch 16
    CLIPUP_CPU_ISA=avx512_vnni python benchmarks/int8_share.py        # without the tiles of a CPU with AMX

The tower runs in turn with the fastest product of gemm_peak.py. The share is the median over these pairs of the tower's
rate over the product's; 1 is a tower that takes no time for anything but matrix products. All of the tower's FLOPs
count, also those of attention. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from clip_throughput import BASELINE, INT8, MODELS, WORDS, build
from gemm_peak import int8_products
from harness import DTYPES, alternate, built_from, clock, number, on_device, run, timed

from clipup.models.tokenizers import get_tokenizer
from clipup_kernels import backend_info

PRODUCT = "product"


@torch.inference_mode()
def measure(args: argparse.Namespace) -> Iterator[dict]:
    flops, product = max(int8_products(), key=lambda case: case[0] / min(clock(case[1], "cpu") for _ in range(5)))
    texts = get_tokenizer(BASELINE)([" ".join(WORDS)] * args.batch_size)
    for name in args.models:
        with torch.inference_mode(False):
            model, counts, images = build(name, DTYPES[args.dtype], texts, threads=args.threads)
        runs = {PRODUCT: product, name: partial(model.encode_image, images)}
        timings = alternate(runs, PRODUCT, args.seconds, min_rounds=args.rounds)
        tower = counts.image_gflops * args.batch_size * 1e9
        yield {
            **on_device(args, args.dtype), "instructions": backend_info()["instructions"],
            "model": name, "batch_size": args.batch_size,
            **timings[name].columns(2), "tflops": f"{tower / timings[name].median_ms / 1e9:.4g}",
            "product_tflops": f"{flops / timings[PRODUCT].median_ms / 1e9:.4g}",
            "share": f"{tower / flops / timings[name].ratio:.3f}", **built_from(),
        }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    usual = [f"{BASELINE} {INT8}", f"{BASELINE} CLIP-UP {INT8}"]
    options = timed(torch.get_num_threads(), rounds=5, seconds=20) | {
        "--models": {"nargs": "+", "choices": MODELS, "default": usual},
        "--dtype": {"choices": list(DTYPES), "default": "bf16", "help": "of what is not int8 (default: bf16)"},
        "--batch-size": number(16, "images a batch"),
    }
    del options["--device"]
    note = "shares are medians of pair-by-pair ratios of rates, the tower over the product"
    return run(
        argv, __doc__, options, measure, "instructions model batch_size median_ms tflops product_tflops share", note
    )


if __name__ == "__main__":
    raise SystemExit(main())
