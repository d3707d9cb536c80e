"""The records of a run: as JSON lines or in memory, in words, and for trackers."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...atomic_files import replace_files
from .trackers import Tracker

LOG = logging.getLogger("clipup.train")
_DATA_LOG = logging.getLogger("clipup.data")
"""What is skipped and read again, which the console shows too."""
Record = dict[str, Any]
KINDS = ("metrics", "evaluations", "warnings")
"""Kinds of records; each has a file KIND.jsonl."""


class Recorder:
    """Takes the records of a run: into the files of its directory, or into memory where there is none."""

    def __init__(
        self,
        directory: Path | None,
        trackers: Sequence[Tracker] = (),
        steps_done: int = 0,
        evaluations_done: int | None = None,
    ) -> None:
        """``trackers`` get the numbers too. ``steps_done``, ``evaluations_done``: those at the checkpoint that the run
        continues from; later records are removed from the files. None keeps all evaluations up to the step."""
        self._memory: dict[str, list[Record]] = {kind: [] for kind in KINDS}
        self._directory, self._trackers = directory, list(trackers)
        if directory is None:
            return
        for kind in KINDS:
            _keep(directory / f"{kind}.jsonl", steps_done, evaluations_done if kind == "evaluations" else None)
        self._handler = _LogFile(directory / "out.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        self._log_before = LOG.level, LOG.propagate
        LOG.setLevel(logging.INFO)
        LOG.propagate = False  # open_clip sets up the root logger, which would print every step over the bar
        for log in (LOG, _DATA_LOG):
            log.addHandler(self._handler)

    def add(self, kind: str, record: Record) -> Record:
        """Adds a record of one of ``KINDS``, and returns it as written. NaN and infinity, which JSON does not have,
        become None; what users' callbacks return, of numpy and torch, becomes numbers and lists, and else text."""
        text = json.dumps(record, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        record = json.loads(text, parse_constant=lambda constant: None)
        if self._directory is None:
            self._memory[kind].append(record)
        else:
            with open(self._directory / f"{kind}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if kind != "warnings":
            shown = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in record.items()}
            LOG.info("%s: %s", kind, " ".join(f"{key} {text}" for key, text in shown.items() if key != "layers"))
            numbers = named_numbers("train" if kind == "metrics" else "val", record)
            self._tell(lambda tracker: tracker.log(numbers, step=record["step"]))
        return record

    def say(self, level: int, text: str) -> None:
        """Writes to the run's log only."""
        if self._directory is not None:
            LOG.log(level, "%s", text)

    def records(self, kind: str) -> list[Record]:
        """All records of the run, including those before a resume."""
        return self._memory[kind] if self._directory is None else read_records(self._directory / f"{kind}.jsonl")

    def _tell(self, what: Callable[[Tracker], object]) -> None:
        """A tracker that fails is left out from then on: the run's own files have all numbers."""
        for tracker in tuple(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # of its own kinds
                self._trackers.remove(tracker)
                text = f"{tracker.name} has failed and gets no more numbers ({type(error).__name__}: {error})"
                self.say(logging.WARNING, text)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def close(self, failed: bool = False) -> None:
        """failed: whether an error ends the run."""
        self._tell(lambda tracker: tracker.close(failed))
        if self._directory is not None:
            level, LOG.propagate = self._log_before
            LOG.setLevel(level)
            for log in (LOG, _DATA_LOG):
                log.removeHandler(self._handler)
            self._handler.close()


def read_records(path: Path) -> list[Record]:
    """The records in a file. A line that a kill has cut off is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class _LogFile(logging.FileHandler):
    """Prints no traceback when a line cannot be written: on a full disk the metrics or the next checkpoint end the run,
    with one message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _keep(path: Path, steps_done: int, most: int | None) -> None:
    """Removes the records of later steps, and those after the first ``most``."""
    if path.is_file():
        kept = [record for record in read_records(path) if record["step"] <= steps_done][:most]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_files({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def named_numbers(prefix: str, value: Any) -> dict[str, float]:
    """The numbers of a nested record by their paths."""
    if isinstance(value, int | float):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return {path: number for key, of_key in items for path, number in named_numbers(f"{prefix}/{key}", of_key).items()}
