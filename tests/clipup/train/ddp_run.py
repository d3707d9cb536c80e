"""Short runs for torchrun: ``ddp_run.py OUT``. Every rank writes its weights to OUT/KIND-RANKS-rank_R.pt.

Each rank takes its part of the same global batches, so that one process without torchrun does what several do.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import open_clip
import torch

import clipup
from clipup.train import TrainOptions, train

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
BATCH_NORMS = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
GLOBAL_BATCH, BATCHES = 8, 2
KINDS = ("dense", "siglip", "multi_positive", "sparse", "balanced", "locked", "caption_alone", "batch_norm")


def run(out: Path, kind: str) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if kind == "siglip" else {}
    vision = BATCH_NORMS if kind == "batch_norm" else VISION
    if kind == "caption_alone":
        model = open_clip.CoCa(
            embed_dim=32,
            text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            multimodal_cfg={**TEXT, "attn_pooler_heads": 2},
        )
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip does not initialize it
    else:
        model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, output_dict=True, **bias)
    if kind == "sparse":
        clipup.upcycle(model, clipup.MoEConfig.clip_up(num_experts=4), inplace=True)
    size = vision["image_size"]
    images = torch.randn(BATCHES, GLOBAL_BATCH, 3, size, size)
    texts = torch.randint(1, 64, (BATCHES, GLOBAL_BATCH, 8))
    if kind in ("balanced", "locked"):
        config = clipup.MoEConfig(num_experts=4, selection_bias="z_score", selection_bias_rate=0.01)
        clipup.upcycle(model, config, inplace=True)
    if kind == "multi_positive":
        texts[:, GLOBAL_BATCH // 2 :] = texts[:, : GLOBAL_BATCH // 2]  # each caption once on either of two ranks
    part = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
    options = TrainOptions(
        device="cpu",
        logs=str(out / "logs"),
        name=f"{kind}-{ranks}",
        steps=6,
        warmup=0,
        lr=1e-3,
        eps=1e-3,  # Adam divides tiny gradients by their size: rounding would decide their sign
        siglip=kind == "siglip",
        coca_contrastive_loss_weight=0.0 if kind == "caption_alone" else 1.0,
        multi_positive=kind == "multi_positive",
        lock_image=kind == "locked",
        train_only="sparse_layers" if kind == "locked" else "all",
    )
    result = train(options, model=model, loader=list(zip(images[:, part], texts[:, part], strict=True)))
    torch.save(result.model.state_dict(), out / f"{kind}-{ranks}-rank_{rank}.pt")


if __name__ == "__main__":
    for each in KINDS:
        run(Path(sys.argv[1]), each)
