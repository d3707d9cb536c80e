"""Puts a trained dense model where the demonstration starts from, in float16.

clipup data icons runs/start/data --package package --leave-out openmoji twemoji ph
clipup study run studies/demo/*.yaml --data runs/start/data --runs runs/start/runs
python -m clipup.demo.ship runs/start/runs/start-5000-lr0.002-s0/model
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import models
from ..checkpoint import save_pretrained
from .run import START


def ship(directory: str | Path, to: str | Path = START) -> None:
    """Writes the model of a directory to another one, its weights in float16.

    Raises:
        FileNotFoundError, ValueError: ``directory`` holds no model.
    """
    model, *_ = models.create_model_and_transforms(str(directory))
    save_pretrained(model.half(), to, models.get_model_config(str(directory)), license="apache-2.0")


if __name__ == "__main__":
    ship(*sys.argv[1:])
