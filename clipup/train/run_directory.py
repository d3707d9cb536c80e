"""The directory of a run and what is written into it.

LOGS/NAME/out.log                 what happened, in words
LOGS/NAME/metrics.jsonl           one line a logged step
LOGS/NAME/evaluations.jsonl       one line an evaluation
LOGS/NAME/warnings.jsonl          one line a collapsed layer (clipup.train.collapse), where there are any
LOGS/NAME/options.json            all options
LOGS/NAME/checkpoints/            epoch_K.pt, epoch_latest.pt
LOGS/NAME/tensorboard/            with report_to="tensorboard"
LOGS/NAME/model/                  the trained model, as clipup.create_model_and_transforms reads it
LOGS/NAME/.lock                   while a process writes there
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..atomic_files import remove_abandoned, replace_files
from ..extras import needed_for
from ..locks import LOCK_FILE, exclusive
from . import checkpoints
from .options import TrainOptions

LOG = logging.getLogger("clipup.train")
Record = dict[str, Any]
_LISTS = ("metrics", "evaluations", "warnings")
_PARTS = ("checkpoints", *(f"{kind}.jsonl" for kind in _LISTS), "options.json", "tensorboard", "model", "out.log")
_DISCARDED = ".discarded.tmp"


def run_name(options: TrainOptions) -> str:
    """The name that was asked for, else one from date, model and learning rate."""
    if options.name:
        return options.name
    model = Path((options.model or options.pretrained or "given").removesuffix("/")).name
    return f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{model}-lr_{options.lr}"


class RunDirectory:
    """Paths of a run; see the module's docstring."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While it is entered, no other run writes here; what killed runs left half-written is removed.

        Raises:
            DirectoryInUse: another run does.
        """
        otherwise = "wait for it to end, or choose another --name"
        with exclusive(self.root / LOCK_FILE, self.root, otherwise):
            for directory in (self.root, self.checkpoints):
                remove_abandoned(directory, locked=True)
            remove_abandoned(self.model)
            shutil.rmtree(self.root / _DISCARDED, ignore_errors=True)
            yield

    def check(self, options: TrainOptions) -> None:
        """
        Raises:
            FileExistsError: it holds another run, and the options neither resume nor discard that.
        """
        held = ", ".join(self._held())
        if held and options.resume is None and not options.force:
            raise FileExistsError(
                f"{self.root} already holds a run ({held}); go on with it by --resume latest, choose another --name, "
                "or throw it away by --force"
            )
        if held and options.resume not in (None, "latest") and not self.holds(Path(options.resume)):
            raise FileExistsError(
                f"{self.root} already holds another run than that of the checkpoint {options.resume}; choose another "
                "--name"
            )

    def prepare(self, options: TrainOptions) -> None:
        """Makes the directory ready for a run that ``check`` let pass; discards the run before it under ``force``."""
        if options.resume is None:
            self._discard(self._held())
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        replace_files({self.root / "options.json": lambda path: path.write_text(options.to_json(), encoding="utf-8")})

    def holds_a_run(self) -> bool:
        """Whether a run has begun here."""
        return bool(self._held())

    def _held(self) -> list[str]:
        return [name for name in _PARTS if (self.root / name).exists()]

    def holds(self, path: Path) -> bool:
        """Whether a file is one of this run's."""
        return self.root.resolve() in path.resolve().parents

    def _discard(self, held: list[str]) -> None:
        """Moved away first, so that a kill in between leaves no half of the run to be resumed."""
        discarded = self.root / _DISCARDED
        discarded.mkdir()
        for name in held:
            (self.root / name).rename(discarded / name)
        shutil.rmtree(discarded)

    def resumed_from(self, resume: str) -> checkpoints.Newest | None:
        """The checkpoint that ``--resume`` means; None when there is none yet.

        Raises:
            ValueError: there are checkpoints, and none can be used, or not the one that was named.
        """
        if resume != "latest":
            return checkpoints.Newest(Path(resume), checkpoints.load(resume), [])
        try:
            return checkpoints.newest(self.checkpoints)
        except ValueError as error:
            raise ValueError(
                f"--resume latest: {error}. Nothing was changed. Bring one back from a copy, name another by --resume "
                "PATH, or start from the beginning with --force in place of --resume"
            ) from error

    def history(self) -> tuple[list[Record], list[Record], list[Record]]:
        """The records of the logged steps, of the evaluations and of the warnings."""
        metrics, evaluations, warnings = (_lines(self.root / f"{kind}.jsonl") for kind in _LISTS)
        return metrics, evaluations, warnings


class _LogFile(logging.FileHandler):
    """Prints no traceback where a line cannot be written: on a full disk the metrics or the next checkpoint end the
    run, with one message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Recorder:
    """Takes the numbers of a run: into files when there is a directory, else into memory."""

    def __init__(
        self, directory: RunDirectory | None, report_to: str = "", done: int = 0, evaluated: int | None = None
    ) -> None:
        """``done``, ``evaluated``: steps and evaluations at the checkpoint that the run goes on from; what was logged
        after it is forgotten."""
        self._memory: dict[str, list[Record]] = {kind: [] for kind in _LISTS}
        self._files: dict[str, Path] = {}
        self._board: Any = None
        self.log = LOG
        self._handlers: list[logging.Handler] = []
        if directory is None:
            return
        for kind in self._memory:
            self._files[kind] = directory.root / f"{kind}.jsonl"
        self._handlers = [_LogFile(directory.root / "out.log", encoding="utf-8")]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        self.log.setLevel(logging.INFO)
        self.log.propagate = False  # open_clip sets up the root logger, which would print every step over the bar
        for handler in self._handlers:
            self.log.addHandler(handler)
        for kind, path in self._files.items():
            _keep_until(path, done, evaluated if kind == "evaluations" else None)
        if report_to == "tensorboard":
            self._board = _summary_writer(directory.root / "tensorboard", purge_step=done + 1)

    def step(self, record: Record) -> None:
        record = _without_nonfinite(record)
        self._add("metrics", record)
        self.log.info("%s", " ".join(f"{key} {_short(record[key])}" for key in record if key != "layers"))

    def evaluation(self, record: Record) -> None:
        self._add("evaluations", record)
        self.log.info("evaluation %s", json.dumps(record))

    def warning(self, text: str, records: list[Record]) -> None:
        for record in records:
            self._add("warnings", record)
        if self._handlers:
            self.log.warning(text)

    def failure(self, text: str) -> None:
        """Why the run ends early; the console gets it from who started the run."""
        if self._handlers:
            self.log.error(text)

    @property
    def steps(self) -> list[Record]:
        """Every logged step of the run, those before a resume included."""
        return self._all("metrics")

    @property
    def evaluations(self) -> list[Record]:
        return self._all("evaluations")

    @property
    def warnings(self) -> list[Record]:
        return self._all("warnings")

    def close(self) -> None:
        self.log.propagate = True
        for handler in self._handlers:
            self.log.removeHandler(handler)
            handler.close()
        if self._board is not None:
            self._board.close()

    def _add(self, kind: str, record: Record) -> None:
        if kind in self._files:
            with open(self._files[kind], "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._memory[kind].append(record)
        if self._board is not None and kind != "warnings":
            for name, value in scalars("train" if kind == "metrics" else "val", record):
                self._board.add_scalar(name, value, record["step"])

    def _all(self, kind: str) -> list[Record]:
        return _lines(self._files[kind]) if kind in self._files else list(self._memory[kind])


def _keep_until(path: Path, done: int, most: int | None) -> None:
    """Drops the lines of steps after ``done``, those after the first ``most``, and lines that are not whole, such as
    one that a kill has cut off."""
    if path.is_file():
        kept = [record for record in _lines(path) if record["step"] <= done][:most]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_files({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def _lines(path: Path) -> list[Record]:
    """The records in a file, without lines that are none."""
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


def _without_nonfinite(value: Any) -> Any:
    """JSON knows no NaN: None in its place, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(prefix: str, record: Record) -> list[tuple[str, float]]:
    """A nested record's numbers by their paths."""
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += scalars(f"{prefix}/{key}", value)
        elif isinstance(value, list):
            found += [(f"{prefix}/{key}/{i}", item) for i, item in enumerate(value)]
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", value))
    return found


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _summary_writer(directory: Path, purge_step: int) -> Any:
    with needed_for("report_to='tensorboard'", "train"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(directory), purge_step=purge_step)
