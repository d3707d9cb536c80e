"""Runs of a tiny CLIP on a CSV file whose samples are noted by every rank; a program for ``rank_processes.ranks``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import open_clip
import torch
from tiny_parallel import TEXT, VISION

import clipup
from clipup.train import TrainOptions, train

GLOBAL_BATCH = 8
MODELS = {
    "sparse": {"capacity_factor": None, "router_noise": 0.0},
    "noisy": {"router_noise": 1.0, "capacity_factor": 1.0},
}
"""MoE configs. The sparse one computes nothing that depends on how a global batch is divided; the noisy one drops
tokens by their places in a batch, whose texts are shuffled, and its router draws noise."""


def preprocess(image: Any) -> torch.Tensor:
    """[3, 16, 16] with noise. The first value is the sample's number, which is its red."""
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()
    number = pixels[0, 0, 0].item()
    pixels = torch.nn.functional.interpolate(pixels[None], (16, 16))[0] / 64 + 0.1 * torch.randn(3, 16, 16)
    pixels[0, 0, 0] = number / 64
    return pixels


def tokenizer(texts: list[str]) -> torch.Tensor:
    """ "7 1 2 63" becomes [7, 1, 2, 63]."""
    words = [(text.split() * 4)[:4] for text in texts]
    return torch.tensor([[int(word) if word.isdigit() else 0 for word in of_text] for of_text in words])


def write_csv(folder: Path, count: int, png: Any) -> str:
    """A CSV file of pictures with captions of two lines."""
    rows = ["filepath\ttitle"]
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
        rows.append(f'{folder / f"{n}.png"}\t"{n} 1 2 63\n{n} 3 4 63"')
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "train.csv")


def run(folder: Path, name: str, kind: str, steps: int, changes: dict[str, Any] | None = None) -> None:
    """Trains, and notes in FOLDER/NAME-rank_R.txt the samples of each batch: one line of numbers."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg={**TEXT, "context_length": 4}, output_dict=True)
    config = {"num_experts": 4, "balance_weight": 0.0, "importance_weight": 0.0, "load_weight": 0.0} | MODELS[kind]
    clipup.upcycle(clip, clipup.MoEConfig(**config), inplace=True)
    noted = folder / f"{name}-rank_{rank}.txt"
    encode = clip.encode_image

    def note(images: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        with noted.open("a") as file:
            file.write(" ".join(str(round(value)) for value in (images[:, 0, 0, 0] * 64).tolist()) + "\n")
        return encode(images, *more, **options)

    clip.encode_image = note
    # Adam divides tiny gradients by their size: with a small eps rounding would decide their sign
    usual = {"warmup": 0, "lr": 1e-3, "eps": 1e-3, "lr_scheduler": "const", "device": "cpu", "workers": 0}
    usual |= {"batch_size": GLOBAL_BATCH // world_size, "train_data": str(folder / "train.csv"), "save_frequency": 0}
    options = TrainOptions(logs=str(folder / "logs"), name=name, steps=steps, **(usual | (changes or {})))
    train(options, model=clip, preprocess=preprocess, tokenizer=tokenizer)
