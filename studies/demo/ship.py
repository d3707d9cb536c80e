"""Installs a trained dense model as the start of the demonstration, in float16.

python -m studies icons runs/start/data --package package --leave-out openmoji twemoji ph
python -m studies run studies/demo --data runs/start/data --runs runs/start/runs
python -m studies.demo.ship runs/start/runs/start-5000-lr0.002-s0/model
"""

from __future__ import annotations

import sys
from pathlib import Path

from clipup.clip import word_tokenizer
from clipup.demo.options import START
from clipup.models import factory, model_card, model_names
from clipup.models.saving import save_pretrained

_README = """---
library_name: clipup
pipeline_tag: zero-shot-image-classification
---

# The dense model that the demonstration starts from

A dense CLIP of 0.5 M parameters (`clipup-icons-w48`, 32 x 32 pixels, whole words), in float16, trained from random
weights by `make demo-start` with the config in `studies/demo` (log: `studies/demo/logs`). Its training images are
openly licensed icons from the npm package @iconify/json, without the sets that the demonstration uses (openmoji,
twemoji, ph). `python -m studies icons` lists their makers and licences.
"""


def ship(directory: str | Path, to: str | Path = START) -> None:
    """Writes a model to another directory, with its weights in float16.

    Raises:
        FileNotFoundError, ValueError: no model in ``directory``.
    """
    model, *_ = factory.create_model_and_transforms(str(directory))
    model_cfg = model_names.get_model_config(str(directory))
    save_pretrained(model.half(), to, model_cfg, tokenizer_directory=directory)
    (Path(to) / model_card.README).write_text(_README, encoding="utf-8")
    (Path(to) / word_tokenizer.FILE_NAME).unlink()  # it is in the package


if __name__ == "__main__":
    ship(*sys.argv[1:])
