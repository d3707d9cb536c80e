"""The directory of a run.

LOGS/NAME/out.log                 what happened, in words
LOGS/NAME/metrics.jsonl           a line per logged step
LOGS/NAME/evaluations.jsonl       a line per evaluation
LOGS/NAME/warnings.jsonl          a line per layer whose routing has collapsed, if any (log.routing_collapse)
LOGS/NAME/options.json            all options
LOGS/NAME/checkpoints/            epoch_K.pt, epoch_latest.pt; sharded ones: epoch_K/, step_N/
LOGS/NAME/tensorboard/            with report_to="tensorboard"
LOGS/NAME/wandb/                  with report_to="wandb"
LOGS/NAME/model/                  the trained model, as clipup.create_model_and_transforms reads it
LOGS/NAME/.lock                   while a process writes there
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ... import checks
from ...atomic_files import remove_abandoned, replace_files
from ...locks import LOCK_FILE, exclusive
from ..log.records import KINDS
from ..options import TrainOptions
from . import open_clip_format

_OPTIONS = "options.json"
_PARTS = ("checkpoints", *(f"{kind}.jsonl" for kind in KINDS), _OPTIONS, "tensorboard", "wandb", "model", "out.log")


def run_name(options: TrainOptions) -> str:
    """The name in the options, or one from date, model and learning rate."""
    if options.name:
        return options.name
    model = Path((options.model or options.pretrained or "given").removesuffix("/")).name
    return f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{model}-lr_{options.lr}"


class RunDirectory:
    """Paths of a run, and who may write there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"

    @contextmanager
    def locked(self, options: TrainOptions) -> Iterator[None]:
        """Inside, no other run writes here. Removes the half-written files of runs that were killed.

        Raises:
            DirectoryInUse: another run writes here.
            FileExistsError: the directory holds another run, and the options neither resume nor discard that run; or
                the checkpoint to resume from is not the newest of the run.
            ValueError, OSError: that checkpoint could not be read.
        """
        with exclusive(self.root / LOCK_FILE, self.root, "wait for it to end, or choose another --name"):
            for directory in (self.root, self.checkpoints, *filter(Path.is_dir, self.checkpoints.glob("*_*"))):
                remove_abandoned(directory, locked=True)
            remove_abandoned(self.model)
            self._check(options)
            yield

    def _check(self, options: TrainOptions) -> None:
        checkpoint = Path(options.resume or "latest")
        if options.resume is not None and self.holds(checkpoint):
            open_clip_format.check_is_newest(checkpoint)
        elif options.resume != "latest" and not options.force and self._parts():
            raise FileExistsError(
                f"{self.root} already holds a run ({', '.join(self._parts())}); continue it with --resume latest, "
                "choose another --name, or discard it with --force"
            )

    def prepare(self, options: TrainOptions, start: Path | None) -> None:
        """Makes the directory ready for a run; discards the former run if this one starts anew.

        Args:
            start: the checkpoint of another run that this one begins from. It is noted in options.json.
        """
        former = self._parts() if start is not None or options.resume is None else []
        if start is not None:
            options = replace(options, resume=str(start.absolute()))
        replace_files({self.root / _OPTIONS: lambda path: path.write_text(options.to_json(), encoding="utf-8")})
        for part in former:
            if part != _OPTIONS:
                open_clip_format.delete(self.root / part)
        self.checkpoints.mkdir(exist_ok=True)

    def begun_from(self) -> Path | None:
        """The checkpoint of another run that this one begins from, as long as it has none of its own."""
        path = self.root / _OPTIONS
        if open_clip_format.all_in(self.checkpoints) or not path.exists():
            return None
        start = checks.read_json(path)["resume"]
        return None if start in (None, "latest") else Path(start)

    def holds(self, path: Path) -> bool:
        """Whether this is one of the run's checkpoints."""
        own = open_clip_format.all_in(self.checkpoints)
        return path.parent.resolve() == self.checkpoints.resolve() and self.checkpoints / path.name in own

    def _parts(self) -> list[str]:
        """What there is of a run."""
        return [name for name in _PARTS if (self.root / name).exists()]
