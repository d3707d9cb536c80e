"""A step of ``clipup train``, dense and CLIP-UP in turn: what sparse layers add in seconds beside what in FLOPs.

    python benchmarks/training_step.py                                # the study's model, one thread, under a minute
    python benchmarks/training_step.py --data 'icons/validation-*.tar'  # the same with a batch of real pairs
    python benchmarks/training_step.py --model ViT-B-16 --batch-size 16 --threads 2 --csv training_step.csv

Weights are random, and without --data images and texts too; texts then end at random places. Forward, contrastive loss
(and the sparse layers'), backward, clipping and AdamW, as the trainer does them. An upcycled text tower leaves padding
out. A dense one can as well: ``dense_unpadded`` is the dense model after ``make_padding_aware``, and ratios are to it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from harness import alternate, built_from, number, run, timed

import clipup
from clipup.clip.flops import count
from clipup.clip.inputs import random_inputs
from clipup.clip.padding_aware import make_padding_aware
from clipup.data.loaders import eval_samples
from clipup.models.factory import create_model_and_transforms, expecting_random_weights
from clipup.models.tokenizers import get_tokenizer
from clipup.precision import Precision
from clipup.train import TrainOptions
from clipup.train.objectives.selection import create_objective
from clipup.train.optimizer.groups import create_optimizer
from clipup.train.parallel.ranks import Ranks
from clipup.train.step import TrainStep
from clipup_kernels.machine import processor_name

BASELINE, DENSE, SPARSE = "dense_unpadded", "dense", "clip_up"
Batch = tuple[torch.Tensor, torch.Tensor]


def real_batch(args: argparse.Namespace, preprocess: Callable) -> Batch:
    """The first pairs of --data: images, and each one's first caption."""
    samples = list(itertools.islice(eval_samples(args.data, preprocess), args.batch_size))
    if len(samples) < args.batch_size:
        raise SystemExit(f"--data {args.data} has {len(samples)} pairs, fewer than --batch-size {args.batch_size}")
    images, captions = zip(*((image, captions[0]) for image, captions, _ in samples), strict=True)
    return torch.stack(images), get_tokenizer(args.model)(list(captions))


def step(model: torch.nn.Module, batch: Batch, args: argparse.Namespace) -> Callable[[], object]:
    """A run of one step on the same batch."""
    device = torch.device(args.device)
    options = TrainOptions.flat(model=args.model, lr=1e-4, device=args.device)
    model = model.train().to(device, torch.bfloat16 if args.precision == "bf16" else None)
    images, texts = batch[0].to(device, next(model.parameters()).dtype), batch[1].to(device)
    objective = create_objective(options.loss, model, Ranks(device), args.precision)
    train_step = TrainStep(
        model, objective, create_optimizer(model, options.optimizer), device, args.precision, grad_clip_norm=1.0
    )
    if not train_step([(images, texts)]).losses.total.isfinite():
        raise SystemExit(f"{args.model} in {args.precision}: a loss that is not finite; nothing was timed")
    return lambda: train_step([(images, texts)])


def measure(args: argparse.Namespace) -> list[dict]:
    with expecting_random_weights():
        dense, _, preprocess = create_model_and_transforms(args.model, load_weights=False)
    batch = random_inputs(dense, args.batch_size) if args.data is None else real_batch(args, preprocess)
    unpadded = copy.deepcopy(dense)
    if not make_padding_aware(unpadded):
        print(f"{args.model}'s text tower computes its padding: {BASELINE} is the same as {DENSE}")
    models = {BASELINE: unpadded, DENSE: dense, SPARSE: clipup.upcycle(dense, clipup.MoEConfig.clip_up())}
    counts = {name: count(model) for name, model in models.items()}
    gflops = {name: 3 * (of.image_gflops + of.text_gflops) for name, of in counts.items()}
    steps = {name: step(model, batch, args) for name, model in models.items()}
    timings = alternate(steps, BASELINE, args.seconds, args.device, args.rounds)
    return [
        {
            "device": processor_name(args.device), "precision": args.precision,
            "threads": args.threads if args.device == "cpu" else "", "batch_size": args.batch_size,
            "model": args.model, "data": Path(args.data).name if args.data else "noise", "impl": name,
            **timing.columns(),
            "gflops_per_pair": f"{gflops[name]:.4g}", "flops_ratio": f"{gflops[name] / gflops[BASELINE]:.3f}",
            "seconds_ratio": f"{timing.ratio:.3f}", **built_from(),
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = timed(threads=1, rounds=5, seconds=30) | {
        "--model": {"default": "clipup-icons-w64", "help": "(default: %(default)s)"},
        "--data": {"help": "shards to take the batch from, such as icons/validation-*.tar (default: noise)"},
        "--precision": {"choices": get_args(Precision), "default": "amp_bf16", "help": "(default: %(default)s)"},
        "--batch-size": number(256, "pairs a batch"),
    }
    columns = "model impl median_ms p20_ms p80_ms gflops_per_pair flops_ratio seconds_ratio"
    return run(argv, __doc__, options, measure, columns, "seconds_ratio is the median of pair-by-pair ratios")


if __name__ == "__main__":
    raise SystemExit(main())
