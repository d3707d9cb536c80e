"""``clipup convert``: makes a model directory of a training checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .flags import parse
from .outputs import empty_directory


@dataclass
class Options:
    """Makes a model directory (a config, weights as safetensors, a card) of a checkpoint of clipup train, sharded or in
    one file. Nothing in the checkpoint is executed. clipup eval, inspect and upcycle, and
    clipup.create_model_and_transforms read the directory.

    Example: clipup convert logs/b16-moe/checkpoints/epoch_3 models/b16-moe
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A directory epoch_K or step_N of a sharded checkpoint, or a file epoch_K.pt, also of open_clip's trainer."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the model. It must be empty or not exist."""
    model: str | None = None
    """The model that was trained, as its run named it, for a checkpoint without its config or its tokenizer."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, "clipup convert")
    from ..models.checkpoint_model import save_checkpoint_model

    with empty_directory(options.out):
        save_checkpoint_model(options.checkpoint, options.out, options.model)
    print(f"saved to {options.out}")
    return 0
