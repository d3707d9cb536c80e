"""Logs of runs that never ran."""

from typing import Any

import pytest

from studies.runner import log, results

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

LAYERS = {
    "visual": {"similarity": 0.8, "load": 1.5, "dropped": 0.1},
    "text": {"similarity": 0.9, "load": 2.5, "dropped": 0.3},
}


def records(
    name: str,
    arm: str = "clip_up",
    lr: float = 0.1,
    seed: int = 0,
    start: str | None = None,
    score: float = 0.5,
    gflops: float = 10.0,
    layers: dict[str, Any] | None = None,
    budget: int | None = None,
    validation: float | None = None,
    steps: int = 5,
) -> list[log.Record]:
    """A log of which no two numbers are alike.

    Args:
        score: R@1 of texts to images in styles never seen. Images to texts have half of it, and names never seen a
            fifth of both.
        validation: the same of validation; default: ``score``.
    """

    def split(r1: float, captions: int = 8) -> log.Record:
        record: log.Record = {"gallery": 8, "captions": captions}
        for way, part in (("text_to_image", 1.0), ("image_to_text", 0.5)):
            record |= {f"{way}_R@1": r1 * part, f"{way}_R@5": r1 * part * 1.5, f"{way}_nll": 2 - r1 * part}
            record[f"{way}_best_nll"] = 1 - r1 * part
        return record

    of_validation = split(score if validation is None else validation, captions=5)
    config = {
        "name": name,
        "arm": arm,
        "model": "m",
        "steps": steps,
        "lr": lr,
        "seed": seed,
        "start": start,
        "budget": budget,
        "data": DATA,
    }
    along = {"similarity": 0.9} if layers else {}
    cost = {"steps": 5, "pairs": 2500, "gflops_per_pair": 0.01, "train_gflops": gflops, "params": 10**6}
    return [
        {"kind": "run", **config},
        *({"kind": "train", "step": step, "lr": 0.0, "loss": 1.0, "contrastive": 1.0 / step} for step in (1, 5)),
        *({"kind": "validation", "step": step, **of_validation, **along} for step in (1, 5)),
        {
            "kind": "test",
            "test_styles": split(score),
            "test_names": split(score / 5),
            "test_drawings": split(score / 2),
            "validation": of_validation,
        },
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


@pytest.fixture
def small_study(write, make_records):
    """A dense start, dense and sparse continuations at two rates, and a second seed of the sparse one."""
    return write(
        make_records("base", "dense", score=0.4, gflops=2e6),
        make_records("dense-a", "dense_continued", 0.1, start="base", score=0.50, gflops=1e6),
        make_records("dense-b", "dense_continued", 0.2, start="base", score=0.45, gflops=1e6),
        make_records("sparse-a", "clip_up", 0.1, start="base", score=0.52, gflops=1.5e6, layers=LAYERS),
        make_records("sparse-s1", "clip_up", 0.1, seed=1, start="base", score=0.56, gflops=1.5e6, layers=LAYERS),
    )
