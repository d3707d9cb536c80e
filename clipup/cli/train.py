"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import tyro

from ..train import NonFiniteLoss, TrainingInterrupted, TrainOptions, train
from .flags import MOE_FLAGS, NoEffect, is_csv, moe_rules, parse
from .outputs import check_directory

_DIVERGED, _INTERRUPTED = 1, 130


_CSV_FLAGS = ("csv_separator", "csv_img_key", "csv_caption_key")


def _reads_csv(options: TrainOptions) -> bool:
    return is_csv(options.train_data, options.dataset_type) or is_csv(options.val_data)


RULES = [
    NoEffect(MOE_FLAGS, lambda options: not options.moe, "without --moe, which makes the model sparse"),
    *moe_rules(lambda options: options.moe_cfg),
    NoEffect(_CSV_FLAGS, lambda options: not _reads_csv(options), "on data that are no CSV file"),
    NoEffect(
        ("train_num_samples", "dataset_resampled"),
        lambda options: is_csv(options.train_data, options.dataset_type),
        "on a CSV file",
    ),
    NoEffect(("val_frequency",), lambda options: options.val_data is None, "without --val-data"),
    NoEffect(("warmup", "lr_scheduler"), lambda options: options.skip_scheduler, "with --skip-scheduler"),
    NoEffect(
        ("local_loss", "gather_with_grad"),
        lambda options: options.siglip,
        "with --siglip",
    ),
    NoEffect(("force",), lambda options: options.resume is not None, "with --resume"),
    NoEffect(("delete_previous_checkpoint",), lambda options: options.save_frequency == 0, "with --save-frequency 0"),
]


def main(argv: list[str]) -> int:
    """Returns 0, 1 when the loss is not finite, 130 after Ctrl-C or SIGTERM (with a checkpoint to go on from)."""
    options = parse(TrainOptions, argv, "clipup train", RULES, config=(tyro.conf.OmitArgPrefixes,))
    check_directory("logs", options.logs)
    try:
        result = train(options)
    except NonFiniteLoss as error:
        _say(f"clipup train: {error}", sys.stderr)
        return _DIVERGED
    except TrainingInterrupted as stopped:
        _say(f"clipup train: {stopped}", sys.stderr)
        return _INTERRUPTED
    last = f", last loss {result.history[-1]['loss']:.4f}" if result.history else ""
    _say(f"{result.steps} steps in {result.seconds:.0f} s of training{last}; see {result.directory}", sys.stdout)
    return 0


def _say(text: str, stream: TextIO) -> None:
    """Once, whatever the number of ranks that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream)
