"""Short runs of a tiny CLIP whose ranks read parts of the same global batches, for any way to spread the model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import open_clip
import torch

import clipup
from clipup.train import TrainOptions, TrainResult, train

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
GLOBAL_BATCH, BATCHES = 16, 2

DROPLESS = {"capacity_factor": None, "loss_scope": "global_batch"}
"""Sparse layers whose outputs and losses do not depend on how a step is divided."""


def model(moe: dict[str, Any] | None, siglip: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if siglip else {}
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True, **bias)
    if moe is None:
        return clip
    return clipup.upcycle(clip, clipup.MoEConfig.clip_up(**{"num_experts": 4, **moe}), inplace=True)


def batches(accum_freq: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the global batches, in as many pieces as are accumulated."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCHES, GLOBAL_BATCH, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 64, (BATCHES, GLOBAL_BATCH, 8), generator=generator)
    size = GLOBAL_BATCH // ranks // accum_freq
    starts = range(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks, size)
    return [(images[i, s : s + size], texts[i, s : s + size]) for i in range(BATCHES) for s in starts]


def run(out: Path, name: str, moe: dict[str, Any] | None = None, **options: Any) -> TrainResult:
    """Trains for four steps; checkpoints and metrics are in OUT/NAME."""
    # Adam divides tiny gradients by their size: with a small eps rounding would decide their sign
    usual: dict[str, Any] = {"warmup": 0, "lr": 1e-3, "eps": 1e-3, "device": "cpu", "steps": 4}
    chosen = TrainOptions(logs=str(out), name=name, **(usual | options))
    return train(chosen, model=model(moe, chosen.siglip), loader=batches(chosen.accum_freq))


def run_all(out: Path, cases: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]) -> None:
    """A program for ranks: the runs by name."""
    for name, (moe, options) in cases.items():
        run(out, name, moe, **options)
