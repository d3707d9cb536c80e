"""Whole models in one alternating run: dense B/32, B/16 and L/14 beside CLIP-UP B/32 and B/16, inference and training.

"accelerated" runs the blocks that stay dense on this project's kernels too (``clipup.accelerate``, inference only);
"int8" quantizes MLPs, experts and attention besides (``weights="int8"``). Dense models run on other engines too, in
inference and where these are installed (engines.py). On a CPU our forms and CLIP-UP stop at the end of the longest
text, where dense models in their usual form and other engines compute all 77 tokens.

    python benchmarks/clip_throughput.py                              # inference of bf16 models, some minutes
    python benchmarks/clip_throughput.py --pass fwd_bwd --batch-size 8
    python benchmarks/clip_throughput.py --dtype fp32 bf16 --csv benchmarks/results/clip_throughput.csv

A training step is forward, contrastive loss, balance and z loss, backward and a step of AdamW. Weights are random:
speed does not depend on them, except that a trained router may be less balanced. Models are cast to the type rather
than run under autocast, which on a CPU is several times slower. Every model runs in turn with dense B/16, two models
in memory at a time; one for which there is not enough is left out by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median

import open_clip
import torch
from engines import ENGINES, OnEngine, engine_of, left_out
from harness import (
    DTYPES,
    Mark,
    Timing,
    alternate,
    between,
    built_from,
    mark,
    number,
    on_device,
    one_line,
    run,
    timed,
)
from torch import Tensor, nn

import clipup
from clipup.clip.flops import TowerCounts, count
from clipup.clip.inputs import image_size
from clipup.models.factory import create_model_and_transforms, expecting_random_weights
from clipup.models.tokenizers import get_tokenizer

BASELINE, LARGE, ACCELERATED, INT8 = "ViT-B-16", "ViT-L-14", "accelerated", "int8"
MODELS = (
    BASELINE, f"ViT-B-16 {ACCELERATED}", f"ViT-B-16 {INT8}", *(f"ViT-B-16 {engine}" for engine in ENGINES),
    "ViT-B-16 CLIP-UP", f"ViT-B-16 CLIP-UP {ACCELERATED}", f"ViT-B-16 CLIP-UP {INT8}",
    "ViT-B-32", f"ViT-B-32 {ACCELERATED}", f"ViT-B-32 {INT8}", "ViT-B-32 openvino", "ViT-B-32 openvino-int8",
    "ViT-B-32 CLIP-UP", f"ViT-B-32 CLIP-UP {ACCELERATED}", f"ViT-B-32 CLIP-UP {INT8}",
    LARGE, f"{LARGE} {ACCELERATED}", f"{LARGE} {INT8}",
)  # fmt: skip
WORDS = "a photograph of one small brown dog that runs along the wide grey beach at dusk".split()
UNTIMED = 3  # calls of the check and of `alternate`, before the timed ones


def build(
    name: str, dtype: torch.dtype, texts: Tensor, device: str = "cpu", training: bool = False, threads: int = 1
) -> tuple[nn.Module | OnEngine, TowerCounts, Tensor]:
    """A model, what it costs on paper, and images for it.

    ``dtype`` is that of the images, and of the model unless another engine runs it; there is an image for each text.
    """
    architecture, *options = name.split()
    engine = engine_of(name)
    with expecting_random_weights():
        model = create_model_and_transforms(architecture, load_weights=False)[0]
    if "CLIP-UP" in options:
        model = clipup.upcycle(model, clipup.MoEConfig.clip_up(), inplace=True)
    model, counts = model.train(training).to(device, torch.float32 if engine else dtype), count(model)
    images = torch.randn(len(texts), 3, *image_size(model)).to(device, dtype)
    if ACCELERATED in options or INT8 in options:
        model = clipup.accelerate(model, inplace=True, weights=INT8 if INT8 in options else None)
    return OnEngine(engine, model, images, texts, threads) if engine else model, counts, images


def inference(
    model: nn.Module | OnEngine, images: Tensor, texts: Tensor, marks: list[tuple[Mark, Mark, Mark]]
) -> Callable[[], tuple[Tensor, ...]]:
    """A run that encodes a batch of pairs; adds to ``marks`` the times before, between and after images and texts."""
    device = images.device.type

    def run() -> tuple[Tensor, ...]:
        start = mark(device)
        of_images = model.encode_image(images)
        middle = mark(device)
        of_texts = model.encode_text(texts)
        marks.append((start, middle, mark(device)))
        return of_images, of_texts

    return run


def training_step(model: nn.Module, images: Tensor, texts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A run of one step on a batch of pairs, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss = open_clip.ClipLoss()

    def run() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        total = loss(*model(images, texts)) + clipup.aux_loss(model)
        total.backward()
        optimizer.step()
        return (total.detach(),)

    return run


def measure(args: argparse.Namespace) -> Iterator[dict]:
    words = WORDS * (args.words // len(WORDS) + 2)
    starts = [number % len(WORDS) for number in range(args.batch_size)]  # other tokens, so that their experts differ
    captions = [" ".join(words[start : start + args.words]) for start in starts]
    texts = get_tokenizer(BASELINE)(captions).to(args.device)
    for pass_, dtype in product(args.passes, args.dtype):
        yield from measure_pass(args, pass_, dtype, texts)


def measure_pass(args: argparse.Namespace, pass_: str, dtype: str, texts: Tensor) -> list[dict]:
    """The rows of one pass and dtype."""
    training = pass_ == "fwd_bwd"
    excluded = left_out(args.models)
    if training or args.device != "cpu":
        excluded |= {name for name in MODELS if name.split()[-1] in (ACCELERATED, INT8, *ENGINES)}
    counts: dict[str, TowerCounts] = {}
    timings: dict[str, Timing] = {}
    marks: dict[str, list[tuple[Mark, Mark, Mark]]] = {}
    towers: dict[str, list[tuple[float, float]]] = {}

    def runner(name: str) -> Callable[[], object]:
        model, counts[name], images = build(name, DTYPES[dtype], texts, args.device, training, args.threads)
        marks[name] = []
        run = training_step(model, images, texts) if training else inference(model, images, texts, marks[name])
        with torch.inference_mode(not training):
            if not all(values.isfinite().all() for values in run()):
                raise SystemExit(f"{name} in {dtype}: values that are not finite; nothing was timed")
        return run

    base = runner(BASELINE)
    for name in MODELS:
        if name not in {*args.models, BASELINE} or name in excluded:
            continue
        pair = None  # the next model takes this one's memory
        try:
            pair = {BASELINE: base, name: base if name == BASELINE else runner(name)}
            with torch.inference_mode(not training):
                timings[name] = alternate(pair, BASELINE, args.seconds, args.device, args.rounds)[name]
            timed = marks[name][UNTIMED:]  # B/16 goes on, as the partner of every other model
            towers[name] = [(between(*of_run[:2]), between(*of_run[1:])) for of_run in timed]
        except torch.OutOfMemoryError as failure:
            print(f"left out: {name} in {dtype}, {pass_}: {one_line(failure)}", file=sys.stderr, flush=True)
        else:
            print(f"{pass_} {dtype} {name}: {timings[name].median_ms:.0f} ms", file=sys.stderr, flush=True)
    large = timings[LARGE].ratio if LARGE in timings else None
    about = {**on_device(args, dtype), "pass": pass_, "batch_size": args.batch_size, "caption_words": args.words}
    return [
        {**about, "model": name, **row(args.batch_size, timings[name], large, counts[name], towers[name])}
        for name in timings
        if name in args.models
    ]


def row(
    batch_size: int, timing: Timing, large: float | None, counted: TowerCounts, towers: list[tuple[float, float]]
) -> dict:
    """The numbers of a model; ``towers`` has the seconds of images and texts, in inference."""
    gflops = (counted.image_gflops + counted.text_gflops) * (1 if towers else 3)
    rates = [f"{batch_size / median(seconds):.2f}" for seconds in zip(*towers, strict=True)] or ("", "")
    return {
        **timing.columns(), "images_per_s": rates[0], "texts_per_s": rates[1],
        "pairs_per_s": f"{batch_size / timing.median_ms * 1e3:.2f}", "gflops_per_pair": f"{gflops:.4g}",
        "params_m": f"{counted.params / 1e6:.0f}", "active_params_m": f"{counted.active_params / 1e6:.0f}",
        "speed_to_b16": f"{1 / timing.ratio:.3f}",
        "speed_to_l14": f"{large / timing.ratio:.3f}" if large else "",
        **built_from(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = timed(torch.get_num_threads(), rounds=5, seconds=20) | {
        "--models": {"nargs": "+", "choices": MODELS, "default": list(MODELS)},
        "--dtype": {"nargs": "+", "choices": list(DTYPES), "default": ["bf16"]},
        "--pass": {
            "nargs": "+", "choices": ("fwd", "fwd_bwd"), "default": ["fwd"], "dest": "passes",
            "help": "fwd: encode images and texts; fwd_bwd: a training step (default: fwd)",
        },
        "--batch-size": number(16, "pairs a batch"),
        "--words": number(12, "words a caption"),
    }  # fmt: skip
    columns = "pass dtype model images_per_s texts_per_s pairs_per_s gflops_per_pair speed_to_b16 speed_to_l14"
    note = f"ratios are medians of pair-by-pair ratios of time, {BASELINE} over the model"
    return run(argv, __doc__, options, measure, columns, note)


if __name__ == "__main__":
    raise SystemExit(main())
