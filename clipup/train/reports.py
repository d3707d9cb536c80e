"""What a run reports while it runs: to its records and log, and on the console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from .checkpoints.remote_sync import RemoteSync
from .checkpoints.run_directory import RunDirectory
from .checkpoints.run_state import Length, RunState
from .log.console import Console
from .log.recorder import LOG, Record, Recorder
from .log.routing_collapse import CollapseWatch, warning
from .log.trackers import check_trackers, create_trackers
from .options import TrainOptions
from .ranks.distributed import Ranks


def check_reports(options: TrainOptions, directory: RunDirectory, continues: bool) -> None:
    """Checks what can be known before the directory is changed, which may hold a run that is to be discarded.

    Args:
        continues: whether the run continues from a checkpoint of its own.

    Raises:
        ValueError: ``remote_sync`` cannot be copied to.
        FileExistsError: it does not, and the copy there has checkpoints.
        ImportError: a package of ``report_to`` is not installed.
    """
    check_trackers(options)
    sync = _remote_sync(options, directory.root, report=LOG.warning)
    if sync is not None and not continues and sync.holds("checkpoints"):
        raise FileExistsError(
            f"{sync.remote} holds the copy of a run, whose checkpoints would be mixed with those of this one. Copy it "
            "back and continue it with --resume latest, choose another --name or --remote-sync, or delete the copy"
        )


def _remote_sync(options: TrainOptions, root: Path, report: Callable[[str], object]) -> RemoteSync | None:
    if options.remote_sync is None:
        return None
    remote = f"{options.remote_sync.rstrip('/')}/{root.name}"
    return RemoteSync(root, remote, options.remote_sync_protocol, options.remote_sync_frequency, report, LOG)


class Reports:
    """The recorder, the console and the watch for collapsed routers of a run. Only rank 0 writes and shows."""

    def __init__(
        self,
        options: TrainOptions,
        model: nn.Module,
        state: RunState,
        length: Length,
        ranks: Ranks,
        directory: RunDirectory | None,
        continues: bool,
    ) -> None:
        root = directory.root if directory and ranks.first else None
        trackers = [] if root is None else create_trackers(options, root, state.step, continues)
        self.recorder = Recorder(root, trackers, state.step, state.evaluations)
        self.console = Console(length.steps, state.step, shown=ranks.first)
        self._sync = None if root is None else _remote_sync(options, root, self._warn)
        self._collapse = CollapseWatch(model, self.recorder.records("warnings"))
        self._state, self._length, self._ranks, self._directory = state, length, ranks, directory

    def _warn(self, text: str) -> None:
        self.log.warning("%s", text)
        self.console.say(f"warning: {text}")

    @property
    def log(self) -> logging.Logger:
        return self.recorder.log

    def start(self, notes: Sequence[str]) -> None:
        """``notes``: what the log says first."""
        for note in notes if self._directory else ():
            self.log.warning("%s", note)
        ranks = f"{self._ranks.world_size} rank{'s' if self._ranks.several else ''}"
        begin = f"from step {self._state.step} to step {self._length.steps} on {self._ranks.device}, {ranks}"
        if self._state.step > self._length.steps:
            begin = f"is at step {self._state.step}, after the {self._length.steps} steps asked for"
        self.log.info("%s; %d samples seen", begin, self._state.samples_seen)
        if self._sync is not None:
            self._sync.start()
        self.console.say(f"training {begin}{f'; {self._directory.root}' if self._directory else ''}")

    def step(self, record: Record) -> None:
        """A logged step."""
        if not self._ranks.first:
            return
        self.recorder.step(record)
        self.console.logged(record)
        if collapsed := self._collapse.observe(record):
            text = warning(collapsed)
            self.recorder.warning(text, collapsed)
            self.console.say(f"warning: {text}")

    def evaluation(self, numbers: Record) -> None:
        """Adds the position of the run to the numbers."""
        place = {"step": self._state.step, "epoch": self._state.epoch, "seconds": self._state.seconds}
        record = {**place, **numbers}
        self.recorder.evaluation(record)
        self.console.evaluation(record)

    def failure(self, error: BaseException) -> None:
        self.recorder.failure(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        self.console.close()
        self.recorder.close()
