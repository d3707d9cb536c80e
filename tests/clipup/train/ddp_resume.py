"""Runs of two ranks that skip, resume, finish and are refused; each writes what it saw to OUT/rank_R.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import open_clip
import torch

from clipup.train import NonFiniteGradients, TrainOptions, TrainResult, train

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
BATCH_NORMS = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
BATCH, BATCHES = 4, 2


def run(out: Path, bad_on: int | None = None, bad: int = 1, **changes: object) -> TrainResult:
    """Two steps an epoch. ``bad``: the batch (of all epochs, from 0) whose images are NaN on rank ``bad_on``."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    vision = BATCH_NORMS if changes.get("name") == "batch norms" else VISION
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, output_dict=True)
    size = vision["image_size"]
    batches = [(torch.randn(BATCH, 3, size, size) + rank, torch.randint(1, 64, (BATCH, 8))) for _ in range(BATCHES)]
    usual = {
        "device": "cpu",
        "logs": str(out),
        "warmup": 0,
        "lr": 1e-3,
        "lr_scheduler": "const",
        "max_nonfinite_steps": 1,
    }

    class Batches(list):
        served = 0

        def __iter__(self):
            for images, texts in super().__iter__():
                spoilt = rank == bad_on and self.served >= bad
                type(self).served += 1
                yield images * math.nan if spoilt and self.served <= bad + 1 else images, texts

    return train(TrainOptions(**{**usual, **changes}), model=model, loader=Batches(batches))


def main(out: Path) -> None:
    first = run(out, name="run", steps=3, bad_on=1)
    found = {"skipped": [record["skipped_steps"] for record in first.history]}
    found["finite"] = all(bool(value.isfinite().all()) for value in first.model.state_dict().values())
    found["idle"] = run(out, name="run", steps=3, resume="latest").already_finished
    resumed = run(out, name="run", steps=5, resume="latest")
    whole = run(out, name="whole", steps=5, bad_on=1)
    found["same"] = all(
        torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    )
    try:
        run(out, name="diverging", steps=6, bad_on=1, save_every_n_steps=1, max_nonfinite_steps=0)
    except NonFiniteGradients as error:
        found["stopped"] = str(error)
    for path in (out / "diverging" / "checkpoints").glob("*.pt") if int(os.environ["RANK"]) == 0 else ():
        path.write_bytes(path.read_bytes()[:1000])
    torch.distributed.barrier()
    try:
        run(out, name="diverging", steps=6, resume="latest")
    except ValueError as error:
        found["refused"] = str(error)
    normed = run(out, name="batch norms", steps=2).model.state_dict()
    found["statistics"] = [float(value.sum()) for name, value in normed.items() if "running_mean" in name]
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
