"""A short run of two ranks with something wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipup.train import Every, TrainOptions, train

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


class Batches:
    """Eight batches; the fault of rank 1 is in front of the fourth."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        for number in range(8):
            if number == 3 and rank == 1 and self.fault == "slow_data":
                time.sleep(60)
            yield torch.randn(4, 3, 16, 16), torch.randint(1, 64, (4, 8))


def main(out: Path, fault: str, timeout: float) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    options = TrainOptions(
        device="cpu", logs=str(out), name="run", steps=8, warmup=0, save_every_n_steps=1, dist_timeout=timeout
    )

    def evaluate(model: Any) -> dict[str, float]:
        time.sleep(1.5 * timeout if fault == "slow_evaluation" else 0)
        return {"score": 1.0}

    train(options, model=model, loader=Batches(fault), callbacks=[Every(4, evaluate)])
