"""What ``clipup train`` costs beside its arithmetic: the wait for data, and the time of its steps over a bare loop.

    python benchmarks/trainer_overhead.py                         # the demo's model, data and batch, about four minutes
    python benchmarks/trainer_overhead.py --data runs/demo/data --csv benchmarks/results/trainer_overhead_cpu.csv

The demo's dense start and its CLIP-UP are trained by ``clipup.train.train``, once on data that are kept in memory, as
in the demo, and once on shards that worker processes decode and tokenise. After every few steps a bare loop does as
many on a copy of the model: forward, loss, backward, clipping and AdamW in plain torch and open_clip, on a batch that
is already there. ``data_share`` is the part of a step of the trainer in which it waits for data. ``overhead`` is the
time of the other part over that of a bare step, less 1. Both are medians over the pairs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from harness import commit, report
from open_clip.loss import ClipLoss
from torch import nn

import clipup
from clipup.data.loaders import train_loader
from clipup.demo.options import START
from clipup.demo.pictograms.build import build
from clipup.models.tokenizers import get_tokenizer
from clipup.train import Every, TrainOptions, train
from clipup_kernels.machine import package_version, processor_name

IN_MEMORY, SHARDS = "in memory", "shards"


class BareLoop:
    """Training steps on one batch without a trainer."""

    def __init__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], lr: float) -> None:
        self.model, self.batch = copy.deepcopy(model).train(), batch
        groups = clipup.parameter_groups(self.model, weight_decay=0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.loss = ClipLoss()

    def step(self) -> None:
        self.optimizer.zero_grad()
        output = self.model(*self.batch)
        loss = self.loss(output["image_features"], output["text_features"], output["logit_scale"])
        (loss + clipup.aux_loss(self.model)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def seconds_of(self, steps: int) -> float:
        """Of one step, as a mean over ``steps``."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps


def measure(model: nn.Module, loader: object, bare: BareLoop, args: argparse.Namespace) -> dict[str, str]:
    """The numbers of a row. The first pair is not counted: memory that is kept between steps is there after it."""
    per_step: list[float] = []
    options = TrainOptions(
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
    after = Every(args.steps_of_pair, lambda _: per_step.append(bare.seconds_of(args.steps_of_pair)))
    done = train(options, model=model, loader=loader, callbacks=[after])
    pairs = list(zip(done.history, per_step, strict=True))[1:]
    shares = [record["data_time"] / record["batch_time"] for record, _ in pairs]
    overheads = [(record["batch_time"] - record["data_time"]) / seconds - 1 for record, seconds in pairs]
    return {
        "batch_ms": f"{1e3 * median(record['batch_time'] for record, _ in pairs):.1f}",
        "bare_step_ms": f"{1e3 * median(seconds for _, seconds in pairs):.1f}",
        "data_share": f"{median(shares):.4f}",
        "overhead": f"{median(overheads):.4f}",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory written by `clipup data` (default: the demo's pictograms, built)")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs a batch (default: 256)")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (default: 0.0002)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read shards (default: 1)")
    parser.add_argument("--pairs", type=int, default=20, help="counted pairs of measurements a row (default: 20)")
    parser.add_argument("--steps-of-pair", type=int, default=10, help="steps of each side of a pair (default: 10)")
    parser.add_argument("--csv", help="file to write the rows to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or Path(scratch, "data")
        if args.data is None:
            build(data)
        rows = rows_of(data, args)
    print(f"{processor_name('cpu')}, {args.threads} thread(s) train, {args.workers} process(es) read shards\n")
    report(rows, "model data batch_ms bare_step_ms data_share overhead", args.csv)
    return 0


def rows_of(data: str | Path, args: argparse.Namespace) -> list[dict[str, str]]:
    dense, _, preprocess = clipup.create_model_and_transforms(str(START), output_dict=True)
    models = {"dense": dense, "CLIP-UP": clipup.upcycle(dense, clipup.MoEConfig.clip_up())}
    tokenizer = get_tokenizer(str(START))
    readers = {IN_MEMORY: {"workers": 0, "cache": True}, SHARDS: {"workers": args.workers}}
    rows = []
    for where, options in readers.items():
        loader = train_loader(data, preprocess, tokenizer, args.batch_size, progress=False, **options)
        batch = next(iter(loader.dataloader))
        for name, model in models.items():
            numbers = measure(copy.deepcopy(model), loader, BareLoop(model, batch, args.lr), args)
            rows.append(
                {
                    "device": processor_name("cpu"), "threads": str(args.threads), "model": name, "data": where,
                    "workers": str(options["workers"]), "batch_size": str(args.batch_size), **numbers,
                    "pairs": str(args.pairs), "steps_of_pair": str(args.steps_of_pair), "commit": commit(),
                    "torch": torch.__version__, "triton": package_version("triton"),
                }
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
