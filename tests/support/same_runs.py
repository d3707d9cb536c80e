"""Runs that have to be the same, and the death of a process in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipup.train import TrainResult

TIMES = ("seconds", "images_per_second", "batch_time", "data_time", "step_time")


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same_weights(one: TrainResult, other: TrainResult) -> None:
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    assert without_times(one.history) == without_times(other.history)
    assert_same_weights(one, other)


def contents(directory: Path) -> dict[Path, bytes]:
    """Of every file below it."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Nothing of the program handles it, as if the process were gone."""


def killed(*args: Any, **kwargs: Any) -> None:
    raise Killed
