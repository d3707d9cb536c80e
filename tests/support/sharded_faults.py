"""Runs of several ranks whose third sharded checkpoint is written by halves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from tiny_parallel import DROPLESS, newest, run

from clipup.train import dcp_storage


def stuck(out: Path, options: dict[str, Any]) -> None:
    """A checkpoint after each step. The threads stop in the middle of the third, and make the file OUT/half-R."""
    write, count = dcp_storage.write_parts, iter(range(100))

    def half(path: Path, *arguments: Any) -> Any:
        sums = write(path, *arguments)
        if next(count) == 2:
            path.write_bytes(path.read_bytes()[: sums.size // 2])
            (out / f"half-{path.name}").touch()
            time.sleep(600)
        return sums

    dcp_storage.write_parts = half
    run(out, "killed", DROPLESS, save_every_n_steps=1, lr_scheduler="const", fsdp_checkpoint="sharded", **options)


def damaged(out: Path, name: str, options: dict[str, Any]) -> None:
    """Damages a file of the newest checkpoint, and resumes."""
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", **options)
    if os.environ["RANK"] == "0":
        path = newest(out / name) / "rank_1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    torch.distributed.barrier()
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", resume="latest", **options)


def continued(out: Path, name: str, options: dict[str, Any]) -> None:
    """Resumes a run."""
    run(out, name, DROPLESS, lr_scheduler="const", fsdp_checkpoint="sharded", resume="latest", **options)
