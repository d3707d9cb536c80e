"""The records of a run: metrics, evaluations and warnings as JSON lines, the log in words, numbers for trackers."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
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
        self._files: dict[str, Path] = {}
        self._trackers = trackers
        self.log = LOG
        self._handler: logging.Handler | None = None
        if directory is None:
            return
        self._files = {kind: directory / f"{kind}.jsonl" for kind in KINDS}
        for kind, path in self._files.items():
            _keep_until(path, steps_done, evaluations_done if kind == "evaluations" else None)
        self._handler = _LogFile(directory / "out.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        self._log_before = self.log.level, self.log.propagate
        self.log.setLevel(logging.INFO)
        self.log.propagate = False  # open_clip sets up the root logger, which would print every step over the bar
        for log in (self.log, _DATA_LOG):
            log.addHandler(self._handler)

    def step(self, record: Record) -> None:
        record = _without_nonfinite(record)
        self._add("metrics", record)
        self.log.info("%s", " ".join(f"{key} {_short(record[key])}" for key in record if key != "layers"))

    def evaluation(self, record: Record) -> None:
        self._add("evaluations", record)
        self.log.info("evaluation %s", json.dumps(record))

    def warning(self, text: str, records: list[Record]) -> None:
        """A message, and a record for each layer that it is about."""
        for record in records:
            self._add("warnings", record)
        if self._handler:
            self.log.warning(text)

    def failure(self, text: str) -> None:
        """Why the run ends early. It goes into the log only: the console gets it from the caller of the run."""
        if self._handler:
            self.log.error(text)

    def records(self, kind: str) -> list[Record]:
        """All records of the run, including those before a resume."""
        return read_records(self._files[kind]) if kind in self._files else list(self._memory[kind])

    def close(self) -> None:
        if self._handler:
            level, self.log.propagate = self._log_before
            self.log.setLevel(level)
            for log in (self.log, _DATA_LOG):
                log.removeHandler(self._handler)
            self._handler.close()
        for tracker in self._trackers:
            tracker.close()

    def _add(self, kind: str, record: Record) -> None:
        if kind in self._files:
            with open(self._files[kind], "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._memory[kind].append(record)
        for tracker in self._trackers if kind != "warnings" else ():
            tracker.log(named_numbers("train" if kind == "metrics" else "val", record), record["step"])


def read_records(path: Path) -> list[Record]:
    """The records in a file. Lines that are not records, such as one that a kill has cut off, are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def named_numbers(prefix: str, record: Record) -> list[tuple[str, float]]:
    """The numbers of a nested record by their paths."""
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += named_numbers(f"{prefix}/{key}", value)
        elif isinstance(value, list):
            found += [(f"{prefix}/{key}/{i}", item) for i, item in enumerate(value)]
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", value))
    return found


class _LogFile(logging.FileHandler):
    """Prints no traceback when a line cannot be written: on a full disk the metrics or the next checkpoint end the run,
    with one message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _keep_until(path: Path, steps_done: int, most: int | None) -> None:
    """Removes the records of later steps, and those after the first ``most``."""
    if path.is_file():
        kept = [record for record in read_records(path) if record["step"] <= steps_done][:most]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_files({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def _without_nonfinite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become None, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
