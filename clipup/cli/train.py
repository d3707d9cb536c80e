"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import tyro

from ..train import NonFiniteLoss, TrainingInterrupted, TrainOptions, train

_DIVERGED, _INTERRUPTED = 1, 130


def main(argv: list[str]) -> int:
    """Returns 0, 1 when the loss is not finite, 130 after Ctrl-C or SIGTERM (with a checkpoint to go on from)."""
    options = tyro.cli(TrainOptions, args=argv, prog="clipup train", config=(tyro.conf.OmitArgPrefixes,))
    try:
        result = train(options)
    except NonFiniteLoss as error:
        _say(f"clipup train: {error}", sys.stderr)
        return _DIVERGED
    except TrainingInterrupted as stopped:
        _say(f"clipup train: {stopped}", sys.stderr)
        return _INTERRUPTED
    last = f", last loss {result.history[-1]['loss']:.4f}" if result.history else ""
    skipped = f", {result.skipped} samples skipped" if result.skipped else ""
    done = f"{result.steps} steps in {result.seconds:.0f} s of training{last}{skipped}"
    _say(f"{done}; see {result.directory}", sys.stdout)
    return 0


def _say(text: str, stream: TextIO) -> None:
    """Once, whatever the number of ranks that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream)
