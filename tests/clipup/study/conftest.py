"""Logs of runs that never ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clipup.study import log, measure, results

DATA = {
    "name": "icons",
    "fingerprint": "f",
    "options": {"size": 32, "seed": 0},
    "source": {"package": "@iconify/json", "version": "1.2.3"},
    "vocabulary": {"words": 6000},
    "skipped": {"shows nothing": 7},
    "left_out_twins": {"test_styles": {"same": 11, "near": 12}},
    "images": {"train": 1000, "validation": 100, "test_styles": 8, "test_names": 8},
}


def records(
    name: str,
    arm: str = "clip_up",
    lr: float = 0.1,
    seed: int = 0,
    start: str | None = None,
    score: float = 0.5,
    gflops: float = 10.0,
    hits: list[bool] | None = None,
    layers: dict[str, Any] | None = None,
    budget: int | None = None,
) -> list[log.Record]:
    """A log with one split's numbers in all splits."""
    answered = torch.zeros(8, dtype=torch.bool) if hits is None else torch.tensor(hits)
    way = {"r1": score, "r5": score, "nll": 1.25, "hits": measure.pack(answered)}
    split = {"gallery": 8, "captions": 8, "t2i": way, "i2t": way}
    config = {"name": name, "arm": arm, "model": "m", "steps": 5, "lr": lr, "seed": seed, "start": start, "data": DATA}
    config["budget"] = budget
    along = {"similarity": 0.9} if layers else {}
    cost = {"steps": 5, "pairs": 40, "gflops_per_pair": 0.01, "train_gflops": gflops, "params": 10**6}
    return [
        {"kind": "run", **config},
        *({"kind": "train", "step": step, "lr": 0.0, "loss": 1.0, "contrastive": 1.0 / step} for step in (1, 5)),
        *({"kind": "validation", "step": step, **split, **along} for step in (1, 5)),
        {"kind": "test", "test_styles": split, "test_names": split, "validation": split},
        *([{"kind": "layers", "layers": layers}] if layers else []),
        {"kind": "cost", **cost, "active_params": 10**6, "seconds": 3600.0, "machine": {"processor": "a CPU"}},
    ]


@pytest.fixture
def make_records():
    return records


@pytest.fixture
def write(tmp_path):
    """Writes logs into a study's directory and reads them back."""

    def write(*logs: list[log.Record]) -> dict[str, results.Result]:
        for one in logs:
            log.write(tmp_path / "logs" / f"{one[0]['name']}.jsonl", one)
        return results.read(tmp_path / "logs")

    return write
