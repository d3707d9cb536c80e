"""Short runs of two ranks with something wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_parallel import TEXT, USUAL, VISION

from clipup.train import Every, NonFiniteGradients, TrainOptions, TrainResult, train

BATCH_NORMS = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def run(
    out: Path,
    batches: int = 2,
    bad: tuple[int, int] | None = None,
    slow: int | None = None,
    callbacks: Any = (),
    **changes: Any,
) -> TrainResult:
    """Trains on batches of this rank.

    Args:
        bad: a rank, and the number of its batch whose images are NaN.
        slow: the number of the batch for which rank 1 waits a minute.
    """
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    vision = BATCH_NORMS if changes.get("name") == "batch norms" else VISION
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, output_dict=True)
    size = (4, 3, vision["image_size"], vision["image_size"])
    pairs = [(torch.randn(size) + rank, torch.randint(1, 64, (4, 8))) for _ in range(batches)]
    numbers = itertools.count()

    class Batches(list):
        def __iter__(self) -> Any:
            for images, texts in super().__iter__():
                number = next(numbers)
                time.sleep(60 if (rank, number) == (1, slow) else 0)
                yield images * (math.nan if bad == (rank, number) else 1), texts

    usual = {**USUAL, "logs": str(out), "name": "run", "lr_scheduler": "const", "max_nonfinite_steps": 1}
    return train(TrainOptions.flat(**(usual | changes)), model=model, loader=Batches(pairs), callbacks=callbacks)


def stalling(out: Path) -> None:
    """The data of rank 1 stall in the fourth step."""
    run(out, batches=8, slow=3, steps=8, save_every_n_steps=1, dist_timeout=60.0)


def evaluating(out: Path, timeout: float) -> None:
    """Rank 0 evaluates for longer than the ranks wait within a step."""

    def evaluate(model: Any) -> dict[str, float]:
        time.sleep(1.5 * timeout)
        return {"score": 1.0}

    run(out, batches=8, steps=8, dist_timeout=timeout, callbacks=[Every(4, evaluate)])


def resumed(out: Path) -> None:
    """Runs that skip, resume, finish and are refused; each rank writes what it saw to OUT/rank_R.json."""
    first = run(out, name="run", steps=3, bad=(1, 1))
    found: dict[str, Any] = {"skipped": [record["skipped_steps"] for record in first.history]}
    found["finite"] = all(bool(value.isfinite().all()) for value in first.model.state_dict().values())
    found["idle"] = run(out, steps=3, resume="latest").already_finished
    second = run(out, steps=5, resume="latest")
    whole = run(out, name="whole", steps=5, bad=(1, 1))
    parameters = zip(second.model.parameters(), whole.model.parameters(), strict=True)
    found["same"] = all(torch.equal(one, other) for one, other in parameters)
    diverging = {"name": "diverging", "steps": 6, "save_every_n_steps": 1, "max_nonfinite_steps": 0}
    with pytest.raises(NonFiniteGradients) as stopped:
        run(out, bad=(1, 1), **diverging)
    for path in (out / "diverging" / "checkpoints").glob("*.pt") if os.environ["RANK"] == "0" else ():
        path.write_bytes(path.read_bytes()[:1000])
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="none can be used"):
        run(out, resume="latest", **diverging)
    found["stopped"] = str(stopped.value)
    normed = run(out, name="batch norms", steps=2).model.state_dict()
    found["statistics"] = [float(value.sum()) for name, value in normed.items() if "running_mean" in name]
    (out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))


def in_session(program: Any, *arguments: Any) -> Any:
    """Calls a program in a session of its own, which hears Ctrl-C: a shell's background jobs ignore it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return program(*arguments)
