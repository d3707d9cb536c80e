"""What a padding-aware text tower saves: ``encode_text`` of CLIP-UP with every token computed and without the padding.

    python benchmarks/padding_aware.py                                # captions of the pictograms, a few minutes
    python benchmarks/padding_aware.py --captions captions.txt --csv padding_aware.csv

Weights are random: speed does not depend on them, except that a trained router may be less balanced. Both ways run on
one model, and their features are compared before anything is timed. ``tokens`` is the share of tokens that are not
padding.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from harness import DTYPES, alternate, built_from, number, on_device, run, timed
from torch import Tensor, nn

import clipup
from clipup.clip.padding_aware import tokens_up_to_pooled
from clipup.demo.pictograms.sources import concepts
from clipup.models.factory import create_model_and_transforms, expecting_random_weights
from clipup.models.tokenizers import get_tokenizer

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Of features of length 1: order and blocking of sums may depend on how many rows an expert has."""
BASELINE = "all_tokens"
MODELS = ("ViT-B-16", "clipup-tiny-32")


def captions(path: str | None, count: int, seed: int = 0) -> list[str]:
    """``count`` captions drawn from the lines of a file, by default from those of the pictograms data set."""
    if path is None:
        lines = [caption for concept in concepts() for caption in concept.captions]
    else:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    return random.Random(seed).choices(lines, k=count)


def build(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, nn.Module]:
    """A dense model and its CLIP-UP with a sparse text tower."""
    with expecting_random_weights():
        dense = create_model_and_transforms(name, load_weights=False)[0]
    sparse = clipup.upcycle(dense, clipup.MoEConfig.clip_up(towers=("text",)))
    return dense.eval().to(device, dtype), sparse.eval().to(device, dtype)


def encoder(model: nn.Module, texts: Tensor, padding_aware: bool) -> Callable[[], Tensor]:
    """A run with the option set to what it says, however the run before had it."""
    layers = clipup.moe_layers(model).values()
    configs = [(layer, layer.config.replace(padding_aware=padding_aware)) for layer in layers]

    def encode() -> Tensor:
        for layer, config in configs:
            layer.config = config
        return model.encode_text(texts, normalize=True)

    return encode


def measure(args: argparse.Namespace) -> list[dict]:
    return [row for name, dtype in product(args.models, args.dtype) for row in measure_one(args, name, dtype)]


def measure_one(args: argparse.Namespace, name: str, dtype: str) -> list[dict]:
    dense, sparse = build(name, DTYPES[dtype], args.device)
    texts = get_tokenizer(name)(captions(args.captions, args.batch_size)).to(args.device)
    candidates = {
        "dense": lambda: dense.encode_text(texts, normalize=True),
        BASELINE: encoder(sparse, texts, padding_aware=False),
        "padding_aware": encoder(sparse, texts, padding_aware=True),
    }
    with torch.inference_mode():
        difference = (candidates["padding_aware"]() - candidates[BASELINE]()).abs().max().item()
        if not difference <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} in {dtype}: features differ by {difference:.1e}; nothing was timed")
        timings = alternate(candidates, BASELINE, args.seconds, args.device, args.rounds)
    share = tokens_up_to_pooled(texts, dense.text_pool_type, dense.text_eos_id).float().mean().item()
    return [
        {
            **on_device(args, dtype), "model": name, "batch_size": args.batch_size,
            "context_length": texts.shape[1], "tokens": "1.000" if impl != "padding_aware" else f"{share:.3f}",
            "impl": impl, **timing.columns(2), "texts_per_s": f"{args.batch_size / timing.median_ms * 1e3:.1f}",
            "ratio_to_all_tokens": f"{timing.ratio:.3f}", **built_from(),
        }
        for impl, timing in timings.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = timed(torch.get_num_threads(), rounds=5, seconds=30) | {
        "--models": {"nargs": "+", "default": list(MODELS), "help": f"default: {' '.join(MODELS)}"},
        "--dtype": {"nargs": "+", "choices": list(DTYPES), "default": ["fp32", "bf16"]},
        "--batch-size": number(64, "texts a batch"),
        "--captions": {"help": "text file, a caption a line (default: captions of the pictograms data)"},
    }
    columns = "model dtype impl tokens median_ms p20_ms p80_ms texts_per_s ratio_to_all_tokens"
    note = f"ratios are medians of pair-by-pair ratios of time, each over {BASELINE}"
    return run(argv, __doc__, options, measure, columns, note)


if __name__ == "__main__":
    raise SystemExit(main())
