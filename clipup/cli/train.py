"""``clipup train``: trains a dense or sparse model."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import tyro

from ..train import TrainingInterrupted, TrainOptions, train

_DIVERGED, _INTERRUPTED = 1, 130


def main(argv: list[str]) -> int:
    """Returns 0, 1 when the loss, gradients or weights are not finite, 130 after Ctrl-C or SIGTERM (with
    a checkpoint to go on from)."""
    options = tyro.cli(TrainOptions, args=argv, prog="clipup train", config=(tyro.conf.OmitArgPrefixes,))
    try:
        result = train(options)
    except FloatingPointError as error:
        _say(f"clipup train: {error}", sys.stderr)
        return _DIVERGED
    except TrainingInterrupted as stopped:
        _say(f"clipup train: {stopped}", sys.stderr)
        return _INTERRUPTED
    if result.already_finished:
        _say(
            f"the run in {result.directory} was finished before, at step {result.steps}; nothing was changed. To train "
            "it further give more --steps or --epochs",
            sys.stdout,
        )
        return 0
    losses = [record["loss"] for record in result.history if record["loss"] is not None]
    last = f", last loss {losses[-1]:.4f}" if losses else ""
    skipped = result.history[-1]["skipped_steps"] if result.history else 0
    last += f", {skipped} steps not applied because their gradient was not finite" if skipped else ""
    _say(f"{result.steps} steps in {result.seconds:.0f} s of training{last}; see {result.directory}", sys.stdout)
    return 0


def _say(text: str, stream: TextIO) -> None:
    """Once, whatever the number of ranks that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream)
