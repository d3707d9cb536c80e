"""The directory of a run and what is written into it.

LOGS/NAME/out.log                 what happened, in words
LOGS/NAME/metrics.jsonl           one line a logged step
LOGS/NAME/evaluations.jsonl       one line an evaluation
LOGS/NAME/options.json            all options
LOGS/NAME/checkpoints/            epoch_K.pt, epoch_latest.pt
LOGS/NAME/tensorboard/            with report_to="tensorboard"
LOGS/NAME/model/                  the trained model, as clipup.create_model_and_transforms reads it
"""

from __future__ import annotations

import json
import logging
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from ..checkpoint import replace_files
from ..extras import needed_for
from . import checkpoints
from .options import TrainOptions

Record = dict[str, Any]
_PARTS = ("out.log", "metrics.jsonl", "evaluations.jsonl", "options.json", "checkpoints", "tensorboard", "model")


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
        if held and options.resume not in (None, "latest") and not self._holds(Path(options.resume)):
            raise FileExistsError(
                f"{self.root} already holds another run than that of the checkpoint {options.resume}; choose another "
                "--name"
            )

    def prepare(self, options: TrainOptions) -> None:
        """Makes the directory ready for a run that ``check`` let pass; discards the run before it under ``force``."""
        if options.resume is None:
            self._discard(self._held())
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.root / "options.json").write_text(options.to_json(), encoding="utf-8")

    def _held(self) -> list[str]:
        return [name for name in _PARTS if (self.root / name).exists()]

    def _holds(self, path: Path) -> bool:
        return self.root.resolve() in path.resolve().parents

    def _discard(self, held: list[str]) -> None:
        for name in held:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def resumed_from(self, resume: str | None) -> Path | None:
        """The checkpoint that ``--resume`` means; None when there is none yet."""
        if resume != "latest":
            return None if resume is None else Path(resume)
        return checkpoints.newest(self.checkpoints)


class Recorder:
    """Takes the numbers of a run: into files when there is a directory, else into memory."""

    def __init__(self, directory: RunDirectory | None, report_to: str = "", done: int = 0) -> None:
        """``done``: steps of the checkpoint that the run goes on from; what was logged after it is forgotten."""
        self._memory: dict[str, list[Record]] = {"metrics": [], "evaluations": []}
        self._files: dict[str, Path] = {}
        self._board: Any = None
        self.log = logging.getLogger("clipup.train")
        self._handlers: list[logging.Handler] = []
        if directory is None:
            return
        for kind in self._memory:
            self._files[kind] = directory.root / f"{kind}.jsonl"
            _keep_until(self._files[kind], done)
        self._handlers = [logging.FileHandler(directory.root / "out.log", encoding="utf-8")]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        self.log.setLevel(logging.INFO)
        self.log.propagate = False  # open_clip sets up the root logger, which would print every step over the bar
        for handler in self._handlers:
            self.log.addHandler(handler)
        if report_to == "tensorboard":
            self._board = _summary_writer(directory.root / "tensorboard", purge_step=done + 1)

    def step(self, record: Record) -> None:
        self._add("metrics", record)
        self.log.info("%s", " ".join(f"{key} {_short(record[key])}" for key in record if key != "layers"))

    def evaluation(self, record: Record) -> None:
        self._add("evaluations", record)
        self.log.info("evaluation %s", json.dumps(record))

    @property
    def steps(self) -> list[Record]:
        """Every logged step of the run, those before a resume included."""
        return self._all("metrics")

    @property
    def evaluations(self) -> list[Record]:
        return self._all("evaluations")

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
        if self._board is not None:
            for name, value in _scalars("train" if kind == "metrics" else "val", record):
                self._board.add_scalar(name, value, record["step"])

    def _all(self, kind: str) -> list[Record]:
        return _lines(self._files[kind]) if kind in self._files else list(self._memory[kind])


def _keep_until(path: Path, done: int) -> None:
    """Drops the lines of steps after ``done``, and a last line that was cut off."""
    if path.is_file():
        kept = "".join(json.dumps(record) + "\n" for record in _lines(path) if record["step"] <= done)
        replace_files({path: lambda temporary: temporary.write_text(kept, encoding="utf-8")})


def _lines(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _scalars(prefix: str, record: Record) -> list[tuple[str, float]]:
    """A nested record's numbers by their paths."""
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(f"{prefix}/{key}", value)
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
