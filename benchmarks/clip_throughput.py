"""Whole models, inference: dense B/16, dense L/14 and CLIP-UP B/16 in one alternating run, beside their counted GFLOPs.

"accelerated" runs the blocks that stay dense on this project's kernels too (``clipup.accelerate``).

    python benchmarks/clip_throughput.py                              # bf16 models, a few minutes
    python benchmarks/clip_throughput.py --dtype fp32 bf16 --batch-size 16 --csv benchmarks/results/clip_throughput.csv

Weights are random: speed does not depend on them, except that a trained router may be less balanced. Models are cast
to the type rather than run under autocast, which on a CPU is several times slower.
"""

from __future__ import annotations

import argparse
import sys

import open_clip
import torch
from harness import alternate, commit, device_name, package_version, print_table, write_csv

import clipup
from clipup.flops import count
from clipup.models import expecting_random_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINE = "ViT-B-16"
MODELS = (BASELINE, "ViT-L-14", "ViT-B-16 CLIP-UP", "ViT-B-16 CLIP-UP accelerated")
WORDS = "a photograph of one small brown dog that runs along the wide grey beach at dusk".split()


def build(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    architecture, *options = name.split()
    with expecting_random_weights():
        model = open_clip.create_model(architecture, load_weights=False)
    if "CLIP-UP" in options:
        model = clipup.upcycle(model, clipup.MoEConfig.clip_up(), inplace=True)
    if "accelerated" in options:
        model = clipup.accelerate(model, inplace=True)
    return model.eval().to(device, dtype)


def measure(args: argparse.Namespace, dtype: str, texts: torch.Tensor) -> list[dict]:
    """The rows of one dtype; its models live no longer than the call."""
    models = {name: build(name, DTYPES[dtype], args.device) for name in dict.fromkeys([BASELINE, *args.models])}
    counts = {name: count(model) for name, model in models.items()}
    images = torch.randn(args.batch_size, 3, 224, 224).to(args.device, DTYPES[dtype])

    def pairs(model):
        return lambda: (model.encode_image(images), model.encode_text(texts))

    with torch.inference_mode():
        check_finite(models, images, texts)
        candidates = {name: pairs(model) for name, model in models.items()}
        timings = alternate(candidates, BASELINE, args.seconds, args.device, args.rounds)
    rows = []
    for name in args.models:
        timing = timings[name]
        gflops = counts[name].image_gflops + counts[name].text_gflops
        pairs_per_second = args.batch_size / timing.median_ms * 1e3
        rows.append({
            "device": device_name(args.device), "dtype": dtype,
            "threads": args.threads if args.device == "cpu" else "", "batch_size": args.batch_size,
            "caption_words": args.words, "model": name, "median_ms": f"{timing.median_ms:.1f}",
            "p20_ms": f"{timing.p20_ms:.1f}", "p80_ms": f"{timing.p80_ms:.1f}",
            "pairs_per_s": f"{pairs_per_second:.2f}", "gflops_per_pair": f"{gflops:.1f}",
            "gflop_per_s": f"{gflops * pairs_per_second:.0f}", "params_m": f"{counts[name].params / 1e6:.0f}",
            "active_params_m": f"{counts[name].active_params / 1e6:.0f}",
            "speed_to_b16": f"{1 / timing.ratio:.3f}",
            "speed_to_l14": f"{timings['ViT-L-14'].ratio / timing.ratio:.3f}" if "ViT-L-14" in timings else "",
            "commit": commit(), "torch": torch.__version__, "triton": package_version("triton"),
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--batch-size", type=int, default=16, help="pairs a batch (default: 16)")
    parser.add_argument("--words", type=int, default=12, help="words a caption (default: 12)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=5, help="least number of alternating rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=60, help="timing budget of one dtype (default: 60)")
    parser.add_argument("--csv", help="file to write the rows to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    caption = " ".join((WORDS * (args.words // len(WORDS) + 1))[: args.words])
    texts = open_clip.get_tokenizer(BASELINE)([caption] * args.batch_size).to(args.device)

    print(f"{device_name(args.device)}; ratios are medians of pair-by-pair ratios of time, {BASELINE} over the model\n")
    rows = [row for dtype in args.dtype for row in measure(args, dtype, texts)]
    columns = "dtype model pairs_per_s gflops_per_pair gflop_per_s active_params_m speed_to_b16 speed_to_l14".split()
    print_table(rows, columns)
    if args.csv:
        write_csv(args.csv, rows)
        print(f"wrote {len(rows)} rows to {args.csv}", file=sys.stderr)
    return 0


def check_finite(models: dict[str, torch.nn.Module], images: torch.Tensor, texts: torch.Tensor) -> None:
    for name, model in models.items():
        for features in (model.encode_image(images[:2]), model.encode_text(texts[:2])):
            if not features.isfinite().all():
                raise SystemExit(f"{name} gives features that are not finite; nothing was timed")


if __name__ == "__main__":
    raise SystemExit(main())
