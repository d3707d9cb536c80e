"""What a run reports while it runs: to its records and log, and on the console."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...progress import Progress
from ..checkpoints.position import RunState
from ..parallel.ranks import Ranks
from .options import ReportingOptions
from .records import LOG, Record, Recorder, named_numbers
from .routing_collapse import CollapseWatch, warning
from .trackers import create_trackers


class Reports:
    """The records, the console and the watch for collapsed routers of a run. Only rank 0 writes and shows.

    The console has a progress bar on a terminal; elsewhere a line after the first step, occasional lines, and one after
    the last.
    """

    def __init__(
        self,
        options: ReportingOptions,
        config: dict[str, Any],
        model: nn.Module,
        state: RunState,
        steps: int,
        ranks: Ranks,
        directory: Path | None,
        continues: bool,
        notes: Sequence[str],
        pairs_at_peak: float | None = None,
    ) -> None:
        """
        Args:
            config: all options of the run by name, for trackers.
            steps: of the whole run.
            directory: of the run.
            continues: whether the run continues from a checkpoint of its own.
            notes: what the log says first.
            pairs_at_peak: pairs per second of all ranks that would be an MFU of 1; None leaves it out.
        """
        root = directory if ranks.first else None
        trackers = [] if root is None else create_trackers(options, config, root, state.step, continues)
        self.recorder = Recorder(root, trackers, state.step, state.evaluations)
        self._collapse = CollapseWatch(model, self.recorder.records("warnings"))
        self.options, self._state, self._ranks, self._pairs_at_peak = options, state, ranks, pairs_at_peak
        self._progress = Progress("training", "steps", steps, state.step, ranks.first, line_at_once=True)
        self._logged: Record = {}
        self._failed = False
        for note in notes:
            self.recorder.say(logging.WARNING, note)
        begin = f"from step {state.step} to step {steps} on {ranks.device}, ranks: {ranks.world_size}"
        LOG.info("%s; %d samples seen", begin, state.samples_seen)
        self._progress.write(f"training {begin}{f'; {directory}' if directory else ''}")

    def step(self) -> None:
        """Counts a step on the console."""
        detail, record = f"epoch {self._state.epoch}", self._logged
        if record:
            at = "" if record["step"] == self._state.step else f" at step {record['step']}"
            detail += f", loss {record['loss']:.4f}{at}, lr {record['lr']:.3g}"
            rate = record["images_per_second"]
            detail += f", {rate:.{0 if rate >= 10 else 1}f} images/s"
        self._progress.update(1, detail)

    def metrics(self, numbers: Record, times: dict[str, float], lr: float) -> None:
        """A logged step: every number of metrics.jsonl.

        Args:
            numbers: ``StepLosses.record``, from the device.
            times: ``Clock.logged``.
        """
        if not self._ranks.first:
            return
        mfu = {} if self._pairs_at_peak is None else {"mfu": times["images_per_second"] / self._pairs_at_peak}
        place = {"step": self._state.step, "epoch": self._state.epoch, "lr": lr}
        record = {**place, **numbers, **times, **mfu, "skipped_steps": self._state.skipped_steps[0]}
        self.recorder.add("metrics", record)
        self._logged = record
        collapsed = self._collapse.observe(record)
        for of_layer in collapsed:
            self.recorder.add("warnings", of_layer)
        if collapsed:
            text = warning(collapsed)
            self.recorder.say(logging.WARNING, text)
            self._progress.write(f"warning: {text}")

    def evaluation(self, numbers: Record) -> None:
        """Adds the position of the run to the numbers. The console leaves out those of splits."""
        place = {"step": self._state.step, "epoch": self._state.epoch, "seconds": self._state.seconds}
        record = self.recorder.add("evaluations", {**place, **numbers})
        shown = named_numbers("", {key: record[key] for key in numbers if key != "splits"})
        text = ", ".join(f"{name.removeprefix('/')} {value:.4g}" for name, value in shown.items())
        self._progress.write(f"evaluation at step {self._state.step}: {text}")

    def failure(self, error: BaseException) -> None:
        """Why the run ends early. The console gets it from the caller of the run."""
        self._failed = True
        self.recorder.say(logging.ERROR, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        self._progress.close()
        self.recorder.close(self._failed)
