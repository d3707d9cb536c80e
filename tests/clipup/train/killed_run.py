"""A run that hangs in the middle of writing its third checkpoint, after printing "half": ``killed_run.py LOGS``."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import open_clip
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import MODEL_CFG, Pairs

from clipup.train import TrainOptions, train


def options(logs: str, **changes) -> TrainOptions:
    usual = {"device": "cpu", "logs": logs, "name": "run", "steps": 6, "lr": 1e-3, "warmup": 2, "save_every_n_steps": 1}
    return TrainOptions(**{**usual, **changes})


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**MODEL_CFG, output_dict=True)


def half(save):
    calls = []

    def save_half(state, file):
        calls.append(file)
        if len(calls) < 3:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        print("half", flush=True)
        time.sleep(600)

    return save_half


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save = half(torch.save)
    train(options(sys.argv[1]), model=model(), loader=Pairs())
