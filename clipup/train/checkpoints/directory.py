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
LOGS/NAME/model_before/           the model of a former end, while the run goes on after it
LOGS/NAME/.lock                   while a process writes there
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import checks
from ...atomic_files import remove_abandoned, replace_files
from ...locks import LOCK_FILE, exclusive
from ...models.model_directory import CONFIG_NAME
from . import kept
from .options import RunDirectoryOptions

_OPTIONS = "options.json"
_PARTS = (
    *("checkpoints", "metrics.jsonl", "evaluations.jsonl", "warnings.jsonl", _OPTIONS, "tensorboard", "wandb"),
    *("model", "model_before", "out.log"),
)


class RunDirectory:
    """Paths of a run, and who may write there."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkpoints = root, root / "checkpoints"
        self.model, self.former_model = root / "model", root / "model_before"

    @contextmanager
    def locked(self, options: RunDirectoryOptions) -> Iterator[None]:
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

    def _check(self, options: RunDirectoryOptions) -> None:
        checkpoint = Path(options.resume or "latest")
        if options.resume is not None and self.holds(checkpoint):
            kept.check_is_newest(checkpoint)
        elif options.resume != "latest" and not options.force and self._parts():
            raise FileExistsError(
                f"{self.root} already holds a run ({', '.join(self._parts())}); continue it with --resume latest, "
                "choose another --name, or discard it with --force"
            )

    def prepare(self, options: dict[str, Any], start: Path | None) -> None:
        """Prepares the directory for a run; discards the former run if the new run starts from scratch.

        Args:
            options: all of the run by name, as JSON has them.
            start: checkpoint of another run from which this run begins. It is noted in options.json.
        """
        former = self._parts() if start is not None or options["resume"] is None else []
        if start is not None:
            options = {**options, "resume": str(start.absolute())}
        text = json.dumps(options, indent=2) + "\n"
        replace_files({self.root / _OPTIONS: lambda path: path.write_text(text, encoding="utf-8")})
        for part in former:
            if part != _OPTIONS:
                kept.delete(self.root / part)
        self.checkpoints.mkdir(exist_ok=True)

    def set_model_aside(self) -> None:
        """Called when a finished run continues: from its next checkpoint on, that model no longer represents the
        run."""
        if (self.model / CONFIG_NAME).is_file():  # a model that could not be written is none
            kept.delete(self.former_model)
            self.model.rename(self.former_model)

    def start(self) -> Path | None:
        """The checkpoint of another run from which this run begins, until it has checkpoints of its own."""
        path = self.root / _OPTIONS
        if kept.all_in(self.checkpoints) or not path.exists():
            return None
        start = checks.read_json(path)["resume"]
        return None if start in (None, "latest") else Path(start)

    def holds(self, path: Path) -> bool:
        """Whether this is one of the run's checkpoints."""
        own = kept.all_in(self.checkpoints)
        return path.parent.resolve() == self.checkpoints.resolve() and self.checkpoints / path.name in own

    def _parts(self) -> list[str]:
        """Names of the parts of a run that exist here."""
        return [name for name in _PARTS if (self.root / name).exists()]
