"""Runs of several ranks with sharded checkpoints: resumed, damaged, or stuck while they write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from tiny_parallel import DROPLESS, newest, resume_all, run

from clipup.train.checkpoints import sharded as sharded_checkpoints
from clipup.train.training_data import Epochs

LAST = "fsdp and ep"
SPREAD = {"replicated": {}, "fsdp": {"fsdp": True}, "ep": {"ep": 2}, LAST: {"fsdp": True, "ep": 2}}
FOUR = {
    "hybrid and ep": {"fsdp": True, "fsdp_replicas": 2, "ep": 2},
    "fsdp and ep of 4": {"fsdp": True, "ep": 4},
}
SHARDED = {"fsdp_checkpoint": "sharded"}
THEN = {"replicated": "fsdp", "fsdp": LAST, "ep": "replicated", LAST: "ep", "full": LAST}
"""Which layout continues which other one."""


def sharded(spreads: dict[str, Any]) -> dict[str, Any]:
    return {name: {**how, **SHARDED} for name, how in spreads.items()}


def continued(out: Path, name: str, options: dict[str, Any]) -> None:
    """Resumes a run."""
    run(out, name, DROPLESS, lr_scheduler="const", resume="latest", **SHARDED, **options)


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
    run(out, "killed", DROPLESS, save_every_n_steps=1, lr_scheduler="const", **SHARDED, **options)


def refused(out: Path, options: dict[str, Any]) -> None:
    """Data that cannot be used end every rank at an epoch's end, while its checkpoint is written."""
    sum_of = sharded_checkpoints.sum_of

    def slow(path: Path) -> Any:
        time.sleep(1)
        return sum_of(path)

    def refuse(*_: Any) -> None:
        raise ValueError("too many")

    sharded_checkpoints.sum_of, Epochs.check_skipped = slow, refuse
    run(out, "refused", DROPLESS, lr_scheduler="const", **SHARDED, **options)


def damaged(out: Path) -> None:
    """Damages a file of the newest checkpoint, and resumes."""
    run(out, "damaged", DROPLESS, lr_scheduler="const", **SHARDED, **SPREAD[LAST])
    if os.environ["RANK"] == "0":
        path = max(newest(out / "damaged").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    torch.distributed.barrier()
    continued(out, "damaged", SPREAD[LAST])


def of_two(out: Path) -> None:
    """Every layout is continued by itself and by another one."""
    spreads = sharded(SPREAD)
    for name, how in spreads.items():
        run(out, f"{name}, whole", DROPLESS, lr_scheduler="const", **how)
    for name, then in THEN.items():
        before = spreads.get(name, SPREAD[LAST])
        resume_all(out, {name: before}, {each: spreads[each] for each in {name, then} if each in spreads})
    resume_all(out, {"one process": {}}, {LAST: spreads[LAST]})
    damaged(out)


def of_four(out: Path) -> None:
    """Four ranks continue what two began, and each other."""
    spreads = sharded(FOUR)
    first, second = spreads
    resume_all(out, {"fsdp": {}, LAST: {}, second: spreads[second]}, {first: spreads[first]})
    resume_all(out, {first: spreads[first]}, spreads)
    run(out, f"{first}, whole", DROPLESS, lr_scheduler="const", **spreads[first])
