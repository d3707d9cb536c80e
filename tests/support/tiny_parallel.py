"""Short runs of a tiny CLIP whose ranks read parts of the same global batches, for any way to spread the model."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from tiny_clip import build, coca_cfg

import clipup
from clipup.train import TrainOptions, TrainResult, train
from clipup.train.checkpoints import kept

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
GLOBAL_BATCH, BATCHES = 16, 2
USUAL: dict[str, Any] = {"warmup": 0, "lr": 1e-3, "eps": 1e-3, "device": "cpu", "steps": 4}
"""Options. Adam divides tiny gradients by their size: with a small eps rounding would decide their sign."""

DROPLESS = {"capacity_factor": None, "loss_scope": "global_batch"}
"""Sparse layers whose outputs and losses do not depend on how a step is divided."""


def model(moe: dict[str, Any] | None, siglip: bool = False, coca: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    if coca:
        return build(coca_cfg(TEXT["context_length"]))
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if siglip else {}
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True, **bias)
    config = clipup.MoEConfig.clip_up(**{"num_experts": 4, **(moe or {})})
    return clip if moe is None else clipup.upcycle(clip, config, inplace=True)


def batches(accum_freq: int = 1, repeated: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the global batches, in as many pieces as are accumulated. repeated: every text is twice in
    a global batch."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCHES, GLOBAL_BATCH, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 64, (BATCHES, GLOBAL_BATCH, 8), generator=generator)
    if repeated:
        texts[:, GLOBAL_BATCH // 2 :] = texts[:, : GLOBAL_BATCH // 2]
    size = GLOBAL_BATCH // ranks // accum_freq
    starts = range(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks, size)
    return [(images[i, s : s + size], texts[i, s : s + size]) for i in range(BATCHES) for s in starts]


def run(out: Path, name: str, moe: dict[str, Any] | None = None, **options: Any) -> TrainResult:
    """Trains for four steps; checkpoints and metrics are in OUT/NAME."""
    chosen = TrainOptions.flat(logs=str(out), name=name, **(USUAL | options))
    loss = chosen.loss
    clip = model(moe, loss.siglip, coca=loss.coca_contrastive_loss_weight == 0)
    return train(chosen, model=clip, loader=batches(chosen.step.accum_freq, loss.multi_positive))


def run_all(out: Path, cases: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]) -> None:
    """A program for ranks: the runs by name."""
    for name, (moe, options) in cases.items():
        run(out, name, moe, **options)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return kept.newest(run / "checkpoints").path


def resume_all(out: Path, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    """A program for ranks: runs two steps with the options of ``before``, and continues each with those of ``after``:
    OUT/BEFORE is continued as "OUT/BEFORE, AFTER", for two steps of another epoch.

    Runs that are there already are not repeated."""
    for name, options in before.items():
        if not (out / name).exists():
            _together()
            run(out, name, DROPLESS, lr_scheduler="const", **{"steps": 2, **options})
        for then, more in after.items():
            continued = f"{name}, {then}"
            if int(os.environ.get("RANK", 0)) == 0:
                shutil.copytree(out / name, out / continued)
            _together()
            run(out, continued, DROPLESS, lr_scheduler="const", resume="latest", **more)


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()
