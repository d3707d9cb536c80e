"""Programs that record the numbers of a run too."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from ...extras import needed_for
from .options import ReportingOptions


class Tracker(NamedTuple):
    """A program that records the numbers of a run too."""

    name: str
    log: Callable[..., object]
    """Takes numbers by name, such as train/loss, and ``step``."""
    close: Callable[[bool], object]
    """Takes whether the run has failed."""


def tracker_module(name: str) -> Any:
    """
    Raises:
        ImportError: the package of this tracker of ``report_to`` is not installed.
    """
    in_torch = name == "tensorboard"
    with needed_for(f"report_to={name!r}", "train" if in_torch else name):
        return importlib.import_module("torch.utils.tensorboard" if in_torch else name)


def check_installed(options: ReportingOptions) -> None:
    """
    Raises:
        ImportError: a package of ``report_to`` is not installed.
    """
    for name in sorted(options.trackers()):
        tracker_module(name)


def create_trackers(
    options: ReportingOptions, config: dict[str, Any], directory: Path, steps_done: int, continues: bool
) -> list[Tracker]:
    """Those of ``report_to``.

    Args:
        config: all options of the run by name.
        directory: of the run. steps_done: those before a resume. continues: whether the run continues from a
            checkpoint of its own.
    """
    run = {"project": options.wandb_project_name, "name": directory.name, "config": config}

    def create(name: str) -> Tracker:
        module = tracker_module(name)
        if name == "tensorboard":
            writer = module.SummaryWriter(str(directory / name), purge_step=steps_done + 1)
            return Tracker(name, partial(_log_scalars, writer), lambda failed: writer.close())
        if name == "wandb":  # offline, into the run's directory, unless the environment says otherwise
            place = {"dir": str(directory), "mode": os.environ.get("WANDB_MODE", "offline")}
            module.init(**run, **place, id=_wandb_id(directory, continues), notes=options.wandb_notes, resume="allow")
            return Tracker(name, module.log, lambda failed: module.finish(exit_code=int(failed)))
        module.init(**run, resume="allow" if continues else "never")  # trackio, into its local database
        return Tracker(name, module.log, lambda failed: module.finish())

    return [create(name) for name in sorted(options.trackers())]


def _wandb_id(directory: Path, continues: bool) -> str:
    """A new id for each run: under a used id, wandb drops the steps that it already has."""
    file = directory / "wandb" / "clipup_run_id"
    if not (continues and file.is_file()):
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _log_scalars(writer: Any, numbers: dict[str, float], step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)
