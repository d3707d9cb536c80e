"""Runs of several ranks with sharded checkpoints, resumed, damaged, or stuck while they write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from tiny_parallel import DROPLESS, newest, resume_all, run

from clipup.train.checkpoints import sharded as sharded_checkpoints

SPREAD = {
    "replicated": {},
    "fsdp": {"fsdp": True},
    "ep": {"ep": 2},
    "fsdp and ep": {"fsdp": True, "ep": 2},
}
FOUR = {
    "hybrid and ep": {"fsdp": True, "fsdp_replicas": 2, "ep": 2},
    "fsdp and ep of 4": {"fsdp": True, "ep": 4},
}
SHARDED = {"fsdp_checkpoint": "sharded"}


def sharded(spreads: dict[str, Any]) -> dict[str, Any]:
    return {name: {**how, **SHARDED} for name, how in spreads.items()}


def stuck(out: Path, options: dict[str, Any]) -> None:
    """A checkpoint after each step. The threads stop in the middle of the third, and make the file OUT/half-NAME."""
    sum_of, count = sharded_checkpoints.sum_of, iter(range(100))

    def half(path: Path) -> Any:
        if next(count) == 2:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            (out / f"half-{path.name}").touch()
            time.sleep(600)
        return sum_of(path)

    sharded_checkpoints.sum_of = half
    run(out, "killed", DROPLESS, save_every_n_steps=1, lr_scheduler="const", fsdp_checkpoint="sharded", **options)


def damaged(out: Path, name: str, options: dict[str, Any]) -> None:
    """Damages a file of the newest checkpoint, and resumes."""
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", **options)
    if os.environ["RANK"] == "0":
        path = max(newest(out / name).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    torch.distributed.barrier()
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", resume="latest", **options)


def continued(out: Path, name: str, options: dict[str, Any]) -> None:
    """Resumes a run."""
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", resume="latest", **options)


def of_two(out: Path) -> None:
    """What two ranks do in the quick tests."""
    spreads = sharded(SPREAD)
    last = "fsdp and ep"
    run(out, f"{last}, whole", DROPLESS, lr_scheduler="const", **spreads[last])
    resume_all(out, {last: spreads[last]}, {name: spreads[name] for name in (last, "replicated")})
    resume_all(out, {"one process": {}, "one process, full": {}}, {last: spreads[last]})
    damaged(out, "damaged", SPREAD[last])


def of_two_more(out: Path) -> None:
    """What two ranks do in the slow tests."""
    spreads = sharded(SPREAD)
    for name in ("replicated", "fsdp", "ep"):
        run(out, f"{name}, whole", DROPLESS, lr_scheduler="const", **spreads[name])
    resume_all(out, {name: spreads[name] for name in ("replicated", "fsdp", "ep")}, spreads)
    resume_all(out, {"full": SPREAD["fsdp and ep"]}, spreads)
    lamb = {**spreads["replicated"], "opt": "timm/lamb"}
    run(out, "lamb, whole", DROPLESS, lr_scheduler="const", **lamb)
    resume_all(out, {"lamb": lamb}, {"lamb": lamb})


def of_four(place: Path) -> None:
    """What four ranks do."""
    spreads = sharded(FOUR)
    resume_all(place, dict.fromkeys(SPREAD, {}), spreads)
    resume_all(place, spreads, spreads)
    for name, how in spreads.items():
        run(place, f"{name}, whole", DROPLESS, lr_scheduler="const", **how)
