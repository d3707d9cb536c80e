"""What a run reports while it runs: to its records and log, and on the console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...progress import Progress
from ..checkpoints.position import RunState
from ..parallel.ranks import Ranks
from .options import RemoteSyncOptions, ReportingOptions
from .records import LOG, Record, Recorder, named_numbers
from .remote_sync import RemoteSync
from .routing_collapse import CollapseWatch, warning
from .trackers import create_trackers, tracker_module


def check_reports(options: ReportingOptions, syncing: RemoteSyncOptions, root: Path, continues: bool) -> None:
    """Checks what can be known before the directory is changed, which may hold a run that is to be discarded.

    Args:
        root: the directory of the run.
        continues: whether the run continues from a checkpoint of its own.

    Raises:
        ValueError: ``remote_sync`` cannot be copied to.
        FileExistsError: it does not, and the copy there has checkpoints.
        ImportError: a package of ``report_to`` is not installed.
    """
    for name in sorted(options.trackers()):
        tracker_module(name)
    sync = _remote_sync(syncing, root, report=LOG.warning)
    if sync is not None and not continues and sync.holds("checkpoints"):
        raise FileExistsError(
            f"{sync.remote} holds the copy of a run, whose checkpoints would be mixed with those of this one. Copy it "
            "back and continue it with --resume latest, choose another --name or --remote-sync, or delete the copy"
        )


def _remote_sync(options: RemoteSyncOptions, root: Path, report: Callable[[str], object]) -> RemoteSync | None:
    if options.remote_sync is None:
        return None
    remote = f"{options.remote_sync.rstrip('/')}/{root.name}"
    return RemoteSync(root, remote, options.remote_sync_frequency, report)


class Reports:
    """The records, the console and the watch for collapsed routers of a run. Only rank 0 writes and shows.

    The console has a progress bar on a terminal; elsewhere a line after the first step, occasional lines, and one after
    the last.
    """

    def __init__(
        self,
        options: ReportingOptions,
        syncing: RemoteSyncOptions,
        config: dict[str, Any],
        model: nn.Module,
        state: RunState,
        steps: int,
        ranks: Ranks,
        directory: Path | None,
        continues: bool,
        notes: Sequence[str],
    ) -> None:
        """
        Args:
            config: all options of the run by name, for trackers.
            steps: of the whole run.
            directory: of the run.
            continues: whether the run continues from a checkpoint of its own.
            notes: what the log says first.
        """
        root = directory if ranks.first else None
        trackers = [] if root is None else create_trackers(options, config, root, state.step, continues)
        self.recorder = Recorder(root, trackers, state.step, state.evaluations)
        self._sync = None if root is None else _remote_sync(syncing, root, self._warn)
        self._collapse = CollapseWatch(model, self.recorder.records("warnings"))
        self._state, self._ranks = state, ranks
        self._progress = Progress("training", "steps", steps, state.step, ranks.first, line_at_once=True)
        self._logged: Record = {}
        self._failed = False
        for note in notes:
            self.recorder.say(logging.WARNING, note)
        begin = f"from step {state.step} to step {steps} on {ranks.device}, ranks: {ranks.world_size}"
        LOG.info("%s; %d samples seen", begin, state.samples_seen)
        if self._sync is not None:
            self._sync.start()
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

    def metrics(self, record: Record) -> None:
        """A logged step."""
        if not self._ranks.first:
            return
        self.recorder.add("metrics", record)
        self._logged = record
        collapsed = self._collapse.observe(record)
        for of_layer in collapsed:
            self.recorder.add("warnings", of_layer)
        if collapsed:
            self._warn(warning(collapsed))

    def evaluation(self, numbers: Record) -> None:
        """Adds the position of the run to the numbers. The console leaves out those of splits."""
        place = {"step": self._state.step, "epoch": self._state.epoch, "seconds": self._state.seconds}
        self.recorder.add("evaluations", {**place, **numbers})
        shown = named_numbers("", {key: value for key, value in numbers.items() if key != "splits"})
        text = ", ".join(f"{name.removeprefix('/')} {value:.4g}" for name, value in shown.items())
        self._progress.write(f"evaluation at step {self._state.step}: {text}")

    def _warn(self, text: str) -> None:
        self.recorder.say(logging.WARNING, text)
        self._progress.write(f"warning: {text}")

    def failure(self, error: BaseException) -> None:
        """Why the run ends early. The console gets it from the caller of the run."""
        self._failed = True
        self.recorder.say(logging.ERROR, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        self._progress.close()
        self.recorder.close(self._failed)
