"""Puts a trained dense model where the demonstration starts from, in float16.

python -m studies icons runs/start/data --package package --leave-out openmoji twemoji ph
python -m studies run studies/demo/*.yaml --data runs/start/data --runs runs/start/runs
python -m clipup.demo.ship runs/start/runs/start-5000-lr0.002-s0/model
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..clip import word_tokenizer
from ..pretrained import factory, model_card, model_names
from ..pretrained.saving import save_pretrained
from .run import START

_README = """# What the demonstration starts from

A dense CLIP of 0.8 M parameters (`clipup-icons-w64`, 32 x 32 pixels, whole words), in float16, trained from random
weights by `make demo-start`: `studies/demo` says how, and `studies/demo/logs` what came out. Its pictures were openly
licensed icons from the npm package @iconify/json, without the sets that the demonstration's pictures are of
(openmoji, twemoji, ph). `python -m studies icons` lists who drew them and under which licences.
"""


def ship(directory: str | Path, to: str | Path = START) -> None:
    """Writes the model of a directory to another one, its weights in float16.

    Raises:
        FileNotFoundError, ValueError: ``directory`` holds no model.
    """
    model, *_ = factory.create_model_and_transforms(str(directory))
    save_pretrained(model.half(), to, model_names.get_model_config(str(directory)))
    (Path(to) / model_card.README).write_text(_README, encoding="utf-8")
    (Path(to) / word_tokenizer.FILE_NAME).unlink()  # the package has it


if __name__ == "__main__":
    ship(*sys.argv[1:])
