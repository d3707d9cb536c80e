"""Runs of a tiny CLIP on a CSV file whose samples are noted by every rank; a program for ``rank_processes.ranks``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import picture_samples
import tiny_parallel
import torch

from clipup.train import TrainOptions, train

GLOBAL_BATCH = 8
_UNWEIGHTED = {"balance_weight": 0.0, "importance_weight": 0.0, "load_weight": 0.0}
MODELS = {
    "sparse": {**_UNWEIGHTED, "capacity_factor": None, "router_noise": 0.0},
    "noisy": {**_UNWEIGHTED, "capacity_factor": 1.0, "router_noise": 1.0},
}
"""MoE configs. The sparse one computes nothing that depends on how a global batch is divided; the noisy one draws
which tokens it drops, and noise."""


def preprocess(image: Any) -> torch.Tensor:
    """[3, 16, 16] with noise. The first value is the sample's number, which is its red."""
    small = picture_samples.preprocess(image) / 64
    pixels = torch.nn.functional.interpolate(small[None], (16, 16))[0] + 0.1 * torch.randn(3, 16, 16)
    pixels[0, 0, 0] = small[0, 0, 0]
    return pixels


def tokenizer(texts: list[str]) -> torch.Tensor:
    """ "7 1 2 63" becomes [7, 1, 2, 63, 7, 1, 2, 63]; words are 0."""
    return torch.tensor([[int(word) if word.isdigit() else 0 for word in (text.split() * 8)[:8]] for text in texts])


def write_csv(folder: Path, count: int, png: Any) -> None:
    """A CSV file of pictures with captions of two lines."""
    rows = ["filepath\ttitle"]
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
        rows.append(f'{folder / f"{n}.png"}\t"{n} 1 2 63\n{n} 3 4 63"')
    (folder / "train.csv").write_text("\n".join(rows) + "\n")


def run(folder: Path, name: str, kind: str, steps: int, changes: dict[str, Any] | None = None) -> None:
    """Trains, and notes in FOLDER/NAME-rank_R.txt the samples of each batch: one line of numbers."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    clip = tiny_parallel.model(MODELS[kind])
    encode = clip.encode_image

    def note(images: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        with (folder / f"{name}-rank_{rank}.txt").open("a") as file:
            print(*(round(value) for value in (images[:, 0, 0, 0] * 64).tolist()), file=file)
        return encode(images, *more, **options)

    clip.encode_image = note
    usual = {**tiny_parallel.USUAL, "lr_scheduler": "const", "workers": 0, "save_frequency": 0}
    usual |= {"batch_size": GLOBAL_BATCH // world_size, "train_data": str(folder / "train.csv")}
    options = TrainOptions.flat(logs=str(folder / "logs"), name=name, **(usual | {"steps": steps} | (changes or {})))
    train(options, model=clip, preprocess=preprocess, tokenizer=tokenizer)
