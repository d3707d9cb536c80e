"""The directory of a run.

LOGS/NAME/out.log                 what happened, in words
LOGS/NAME/metrics.jsonl           a line per logged step
LOGS/NAME/evaluations.jsonl       a line per evaluation
LOGS/NAME/warnings.jsonl          a line per layer whose routing has collapsed, if any (log.routing_collapse)
LOGS/NAME/options.json            all options
LOGS/NAME/begun_from.json         the other run's checkpoint that the run begins from; counts until it has its own
LOGS/NAME/checkpoints/            epoch_K.pt, epoch_latest.pt; sharded ones: epoch_K/, step_N/
LOGS/NAME/tensorboard/            with report_to="tensorboard"
LOGS/NAME/wandb/                  with report_to="wandb"
LOGS/NAME/model/                  the trained model, as clipup.create_model_and_transforms reads it
LOGS/NAME/.lock                   while a process writes there
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ... import checks
from ...atomic_files import remove_abandoned, replace_files
from ...locks import LOCK_FILE, exclusive
from ..log.recorder import KINDS, Record, read_records
from ..options import TrainOptions
from ..ranks.distributed import Ranks
from . import open_clip_format, sharded_checkpoints

_START = "begun_from.json"
_PARTS = (
    "checkpoints",
    *(f"{kind}.jsonl" for kind in KINDS),
    "options.json",
    "tensorboard",
    "wandb",
    "model",
    "out.log",
)
"""Of a run, in the order in which they are discarded."""


def load_together(path: Path, ranks: Ranks) -> dict[str, Any]:
    """``checkpoints.load`` by all ranks, with the same result or error on all. Of a sharded checkpoint each rank checks
    some of the files, and the state is without tensors."""
    if not ranks.first_does(path.is_dir):
        loaded: list[dict[str, Any]] = []
        ranks.first_does(lambda: loaded.append(open_clip_format.load(path)))
        return loaded[0] if loaded else open_clip_format.load(path)
    state, failure = {}, None
    try:
        with open_clip_format.errors_named(path):
            sharded_checkpoints.check(path, ranks.rank, ranks.world_size)
            state = sharded_checkpoints.read_state(path)
    except (ValueError, OSError) as error:
        failure = error
    for of_rank in ranks.gather(failure):
        if of_rank is not None:
            raise of_rank
    return state


def _check_is_directory(path: Path) -> None:
    """Refuses what is there and is no directory, before anything beside it is changed."""
    if os.path.lexists(path) and not path.is_dir():
        what = f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "a file"
        raise OSError(f"{path} is {what}, and should be a directory; nothing was changed")


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
    def locked(self) -> Iterator[None]:
        """Inside, no other run writes here. Removes the half-written files of runs that were killed.

        Raises:
            DirectoryInUse: another run writes here.
            OSError: the run's directory, or that of its checkpoints, is a file, or a link to what is not there.
        """
        for path in (self.root, self.checkpoints):
            _check_is_directory(path)
        otherwise = "wait for it to end, or choose another --name"
        with exclusive(self.root / LOCK_FILE, self.root, otherwise):
            for directory in (self.root, self.checkpoints, *sharded_checkpoints.directories(self.checkpoints)):
                remove_abandoned(directory, locked=True)
            remove_abandoned(self.model)
            yield

    def check(self, options: TrainOptions) -> None:
        """
        Raises:
            FileExistsError: it holds another run, and the options neither resume nor discard that run; or the
                checkpoint to resume from is not the newest of the run.
            ValueError, OSError: that checkpoint, or one that may be newer, could not be read.
        """
        parts = ", ".join(self._parts())
        if parts and options.resume is None and not options.force:
            raise FileExistsError(
                f"{self.root} already holds a run ({parts}); continue it with --resume latest, choose another --name, "
                "or discard it with --force"
            )
        if options.resume in (None, "latest"):
            return
        checkpoint = Path(options.resume)
        if options.force and self.root.resolve() in checkpoint.resolve().parents:
            raise ValueError(
                f"force discards the run in {self.root}, and the checkpoint {checkpoint} is its own; drop --force "
                "to continue it, or choose another --name"
            )
        if self.holds(checkpoint):
            open_clip_format.check_is_newest(self.checkpoints / checkpoint.name)
        elif parts and not options.force:
            raise FileExistsError(
                f"{self.root} already holds a run, and the checkpoint {checkpoint} is not one of its {self.checkpoints}"
                " (epoch_K.pt, epoch_latest.pt, epoch_K or step_N); continue the run there with --resume latest, "
                "choose another --name, or discard it with --force"
            )

    def prepare(self, options: TrainOptions, start: Path | None) -> None:
        """Makes the directory ready for a run that ``check`` accepted; discards the former run under ``force``.

        What the run begins from is written first, and the former checkpoints are discarded first: whenever the process
        is killed, either the former run is there, or it is known where this one begins.
        """
        former = self._parts() if start is not None or options.resume is None else []
        self.begins_from(start)
        for part in former:
            open_clip_format.delete(self.root / part)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        replace_files({self.root / "options.json": lambda path: path.write_text(options.to_json(), encoding="utf-8")})

    def begins_from(self, start: Path | None) -> None:
        """Notes the checkpoint of another run that this one begins from, for ``--resume latest`` until it has a
        checkpoint of its own; None: it begins at step 0, or has one."""
        if start is None:
            (self.root / _START).unlink(missing_ok=True)
            return
        noted = json.dumps({"checkpoint": str(start.absolute())}) + "\n"
        replace_files({self.root / _START: lambda path: path.write_text(noted, encoding="utf-8")})

    def begun_from(self) -> Path | None:
        """The checkpoint of another run that this one begins from, as long as it has none of its own."""
        path = self.root / _START
        if open_clip_format.held_in(self.checkpoints) or not path.exists():
            return None
        return Path(checks.read_json(path)["checkpoint"])

    def holds_a_run(self) -> bool:
        """Whether a run has started here; a note where it should begin is not yet one."""
        return bool(self._parts())

    def holds(self, path: Path) -> bool:
        """Whether this is one of the run's checkpoints."""
        return path.parent.resolve() == self.checkpoints.resolve() and (
            self.checkpoints / path.name in open_clip_format.held_in(self.checkpoints)
        )

    def resumed_from(self, resume: str, ranks: Ranks) -> open_clip_format.Newest | None:
        """The checkpoint that ``--resume`` selects; None when there is none yet. A collective. Of a sharded checkpoint
        the state is without tensors.

        Raises:
            ValueError: none of the checkpoints can be used, or the selected one cannot.
        """
        if resume != "latest":
            return open_clip_format.Newest(Path(resume), load_together(Path(resume), ranks), [])
        folder = self.checkpoints
        paths, unusable = ranks.first_does(lambda: open_clip_format.candidates(folder))
        return open_clip_format.first_usable(folder, paths, unusable, lambda path: load_together(path, ranks))

    def history(self) -> dict[str, list[Record]]:
        """The records of the run by kind."""
        return {kind: read_records(self.root / f"{kind}.jsonl") for kind in KINDS}

    def _parts(self) -> list[str]:
        return [name for name in _PARTS if os.path.lexists(self.root / name)]
