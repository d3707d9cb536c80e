"""Programs that record the numbers of a run besides its own files: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from ...extras import needed_for
from ..options import TrainOptions


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, numbers: list[tuple[str, float]], step: int) -> None:
        """numbers: by name, such as train/loss."""

    def close(self) -> None: ...


def check_trackers(options: TrainOptions) -> None:
    """
    Raises:
        ImportError: a package of ``report_to`` is not installed.
    """
    for name in sorted(options.trackers()):
        _summary_writer() if name == "tensorboard" else _module(name)


def create_trackers(options: TrainOptions, directory: Path, steps_done: int, continues: bool) -> list[Tracker]:
    """Those of ``report_to``, which ``check_trackers`` has accepted.

    Args:
        directory: of the run. steps_done: those before a resume. continues: whether the run continues from a
            checkpoint of its own.
    """
    common = {"project": options.wandb_project_name, "name": directory.name, "config": json.loads(options.to_json())}
    trackers: list[Tracker] = []
    if "tensorboard" in options.trackers():
        trackers.append(_TensorBoard(directory / "tensorboard", purge_step=steps_done + 1))
    if "wandb" in options.trackers():  # offline, into the run's directory, unless the environment says otherwise
        place = {"id": directory.name, "dir": str(directory), "mode": os.environ.get("WANDB_MODE", "offline")}
        trackers.append(_Run(_module("wandb"), notes=options.wandb_notes, resume="allow", **common, **place))
    if "trackio" in options.trackers():  # into its local database
        trackers.append(_Run(_module("trackio"), resume="allow" if continues else "never", **common))
    return trackers


class _TensorBoard:
    def __init__(self, directory: Path, purge_step: int) -> None:
        self._writer: Any = _summary_writer()(str(directory), purge_step=purge_step)

    def log(self, numbers: list[tuple[str, float]], step: int) -> None:
        for name, value in numbers:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of wandb, or of trackio, which has the same functions."""

    def __init__(self, module: Any, **settings: Any) -> None:
        self._module = module
        module.init(**settings)

    def log(self, numbers: list[tuple[str, float]], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


def _summary_writer() -> Any:
    with needed_for("report_to='tensorboard'", "train"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _module(name: str) -> Any:
    with needed_for(f"report_to={name!r}", name):
        return importlib.import_module(name)
