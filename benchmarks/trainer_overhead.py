"""What ``clipup train`` costs beside its arithmetic: the wait for data, and the time of its steps over a bare loop.

    python benchmarks/trainer_overhead.py                         # the demo's model, data and batch, eight minutes
    python benchmarks/trainer_overhead.py --data runs/demo/data --csv benchmarks/results/trainer_overhead_cpu.csv

The demo's dense start and its CLIP-UP are trained by ``clipup.train.train``, once on data that are kept in memory, as
in the demo, and once on shards that worker processes decode and tokenise. After every few steps a bare loop does as
many on a copy of the model: forward, loss, backward, clipping and AdamW in plain torch and open_clip, on a batch that
is already there. ``overhead`` is the time of a step of the trainer without its wait for data over that of a bare step,
less 1; the median over the pairs. ``data_share`` is the part of a step in which it waits, in a run without bare steps,
during which the readers would get ahead.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from harness import built_from, clock, number, run
from open_clip.loss import ClipLoss
from torch import nn

import clipup
from clipup.data.loaders import train_loader
from clipup.demo.options import START
from clipup.demo.pictograms.build import build
from clipup.models.tokenizers import get_tokenizer
from clipup.train import Every, TrainOptions, train
from clipup_kernels.machine import processor_name

Batch = tuple[torch.Tensor, torch.Tensor]


def bare_loop(model: nn.Module, batch: Batch, lr: float, steps: int) -> Callable[[], float]:
    """A run of ``steps`` training steps on one batch without a trainer; it returns the mean seconds of a step."""
    model = copy.deepcopy(model).train()
    groups = clipup.parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    parameters, clip_loss = [parameter for group in groups for parameter in group["params"]], ClipLoss()

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(*batch)
            loss = clip_loss(output["image_features"], output["text_features"], output["logit_scale"])
            (loss + clipup.aux_loss(model)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return lambda: clock(run, "cpu") / steps


def measure_pairs(model: nn.Module, loader: object, batch: Batch, args: argparse.Namespace) -> dict[str, str]:
    """The numbers of a row. The first pair is not counted: memory that is kept between steps is there after it."""
    bare, per_step = bare_loop(model, batch, args.lr, args.steps_of_pair), []
    options = TrainOptions.flat(
        logs=None,
        steps=args.steps_of_pair * (args.pairs + 1),
        log_every_n_steps=args.steps_of_pair,
        batch_size=args.batch_size,
        lr=args.lr,
        wd=0.1,
        warmup=args.steps_of_pair,
        grad_clip_norm=1.0,
        precision="fp32",
        device="cpu",
    )
    # the share of data in a run of its own: during the bare steps, the readers would fill their queues
    alone = train(options, model=copy.deepcopy(model), loader=loader).history[1:]
    shares = [record["data_time"] / record["batch_time"] for record in alone]
    after = Every(args.steps_of_pair, lambda _: per_step.append(bare()))
    done = train(options, model=copy.deepcopy(model), loader=loader, callbacks=[after])
    pairs = list(zip(done.history, per_step, strict=True))[1:]
    overheads = [(record["batch_time"] - record["data_time"]) / seconds - 1 for record, seconds in pairs]
    return {
        "batch_ms": f"{1e3 * median(record['batch_time'] for record, _ in pairs):.1f}",
        "bare_step_ms": f"{1e3 * median(per_step[1:]):.1f}",
        "data_share": f"{median(shares):.4f}",
        "overhead": f"{median(overheads):.4f}",
    }


def measure(args: argparse.Namespace) -> Iterator[dict]:
    dense, _, preprocess = clipup.create_model_and_transforms(str(START), output_dict=True)
    models = {"dense": dense, "CLIP-UP": clipup.upcycle(dense, clipup.MoEConfig.clip_up())}
    tokenizer = get_tokenizer(str(START))
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            args.data = Path(scratch, "data")
            build(args.data)
        for where, reading in {"in memory": dict(workers=0, cache=True), "shards": dict(workers=args.workers)}.items():
            loader = train_loader(args.data, preprocess, tokenizer, args.batch_size, progress=False, **reading)
            batch = next(iter(loader.dataloader))
            for name, model in models.items():
                yield {
                    "device": processor_name("cpu"), "threads": args.threads, "model": name, "data": where,
                    "workers": reading["workers"], "batch_size": args.batch_size,
                    **measure_pairs(model, loader, batch, args),
                    "pairs": args.pairs, "steps_of_pair": args.steps_of_pair, **built_from(),
                }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = {
        "--data": {"help": "directory written by `clipup data` (default: the demo's pictograms, built)"},
        "--batch-size": number(256, "pairs a batch"),
        "--lr": number(2e-4, "peak learning rate"),
        "--threads": number(1, "threads of the training process"),
        "--workers": number(1, "processes that read shards"),
        "--pairs": number(20, "counted pairs of measurements a row"),
        "--steps-of-pair": number(10, "steps of each side of a pair"),
    }
    return run(argv, __doc__, options, measure, "model data batch_ms bare_step_ms data_share overhead")


if __name__ == "__main__":
    raise SystemExit(main())
