"""The directory of a run.

LOGS/NAME/out.log                 what happened, in words
LOGS/NAME/metrics.jsonl           a line per logged step
LOGS/NAME/evaluations.jsonl       a line per evaluation
LOGS/NAME/warnings.jsonl          a line per layer whose routing has collapsed, if any (clipup.train.routing_collapse)
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
from typing import Any, NamedTuple

from .. import checks
from ..atomic_files import remove_abandoned, remove_directory, replace_files
from ..locks import LOCK_FILE, exclusive
from . import checkpoints, sharded_checkpoints
from .distributed import Ranks
from .options import TrainOptions
from .recorder import KINDS, Record, read_records

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
_DISCARDING = ".discarding.tmp"


def load_together(path: Path, ranks: Ranks) -> dict[str, Any]:
    """``checkpoints.load`` by all ranks, with the same result or error on all. Of a sharded checkpoint each rank checks
    some of the files, and the state is without tensors."""
    if not ranks.first_does(path.is_dir):
        loaded: list[dict[str, Any]] = []
        ranks.first_does(lambda: loaded.append(checkpoints.load(path)))
        return loaded[0] if loaded else checkpoints.load(path)
    state, failure = {}, None
    try:
        state = checkpoints.load_share(path, ranks.rank, ranks.world_size)
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


class Start(NamedTuple):
    """A checkpoint of another run, from which a run begins."""

    checkpoint: Path
    step: int


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
            self._finish_discarding()
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
        if options.resume not in (None, "latest"):
            self._check_resumed(options, Path(options.resume), bool(parts))

    def _check_resumed(self, options: TrainOptions, checkpoint: Path, started: bool) -> None:
        if not os.path.lexists(checkpoint):
            raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
        if self.holds(checkpoint):
            checkpoints.check_is_newest(self.checkpoints / checkpoint.name)
            if options.force:
                raise ValueError(
                    f"force discards the run in {self.root}, and the checkpoint {checkpoint} is its own; drop --force "
                    "to continue it, or choose another --name"
                )
        elif checkpoint.is_dir() and not sharded_checkpoints.is_name(checkpoint.name):
            raise ValueError(
                f"{checkpoint} is a directory, and no sharded checkpoint (epoch_K or step_N); name one of the "
                "checkpoints in it, or continue a run with its --name and --resume latest"
            )
        elif self._is_inside(checkpoint):
            raise FileExistsError(
                f"the checkpoint {checkpoint} has another place or name than those of its run ({self.checkpoints}: "
                "epoch_K.pt, epoch_latest.pt, epoch_K or step_N), so the run would not find it again; choose another "
                "--name to continue from it"
            )
        elif started and not options.force and not self._is_start(checkpoint):
            raise FileExistsError(
                f"{self.root} already holds a run, and the checkpoint {checkpoint} is of another one; continue the run "
                "there with --resume latest, choose another --name, or discard it with --force"
            )

    def prepare(self, options: TrainOptions, start: Start | None) -> None:
        """Makes the directory ready for a run that ``check`` accepted; discards the former run under ``force``.

        What the run begins from is written first: whenever the process is killed, either the former run is there, or
        it is known where this one begins.
        """
        former = self._parts() if start is not None or options.resume is None else []
        self.begins_from(start)
        self._discard(former)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        replace_files({self.root / "options.json": lambda path: path.write_text(options.to_json(), encoding="utf-8")})

    def begins_from(self, start: Start | None) -> None:
        """Notes where the run begins, for ``--resume latest`` until it has a checkpoint of its own; None: at step 0, or
        it has one."""
        if start is None:
            (self.root / _START).unlink(missing_ok=True)
            return
        noted = json.dumps({"checkpoint": str(start.checkpoint.absolute()), "step": start.step}) + "\n"
        replace_files({self.root / _START: lambda path: path.write_text(noted, encoding="utf-8")})

    def begun_from(self) -> Start | None:
        """Where the run begins, as long as it has no checkpoint of its own. With one, or a trained model, a note does
        not count, whoever brought it there: a copy of an earlier state, or a start that was killed before it discarded
        this run.

        Raises:
            ValueError: the note is damaged.
        """
        path = self.root / _START
        begun = checkpoints.held_in(self.checkpoints) or os.path.lexists(self.model)
        if begun or not os.path.lexists(path):
            return None
        try:
            noted = checks.read_json(path)
            return Start(Path(noted["checkpoint"]), int(noted["step"]))
        except (ValueError, OverflowError, TypeError, KeyError, OSError) as error:
            raise ValueError(
                f"{path} should name the checkpoint that the run begins from, and cannot be used ({error}); begin "
                "again with --force: from a checkpoint with --resume PATH, or from step 0 without --resume"
            ) from error

    def _is_start(self, checkpoint: Path) -> bool:
        """Whether the run was stopped before its first checkpoint, and begins from this one again."""
        start = self.begun_from()
        return start is not None and os.path.realpath(start.checkpoint) == os.path.realpath(checkpoint)

    def holds_a_run(self) -> bool:
        """Whether a run has started here; a note where it should begin is not yet one."""
        return bool(self._parts())

    def holds(self, path: Path) -> bool:
        """Whether this is one of the run's checkpoints."""
        return os.path.realpath(path.parent) == os.path.realpath(self.checkpoints) and (
            self.checkpoints / path.name in checkpoints.held_in(self.checkpoints)
        )

    def _is_inside(self, path: Path) -> bool:
        return Path(os.path.realpath(self.root)) in Path(os.path.realpath(path)).parents or self.holds(path)

    def resumed_from(self, resume: str, ranks: Ranks) -> checkpoints.Newest | None:
        """The checkpoint that ``--resume`` selects; None when there is none yet. A collective. Of a sharded checkpoint
        the state is without tensors.

        Raises:
            ValueError: none of the checkpoints can be used, or the selected one cannot.
        """
        if resume != "latest":
            return self._selected(Path(resume), ranks)
        folder = self.checkpoints
        try:
            paths, unusable = ranks.first_does(lambda: checkpoints.candidates(folder))
            return checkpoints.first_usable(folder, paths, unusable, lambda path: load_together(path, ranks))
        except ValueError as error:
            raise ValueError(
                f"--resume latest: {error}. Nothing was changed. Restore one from a copy, continue from a copy "
                "elsewhere with --resume PATH and another --name, or start from the beginning with --force in place of "
                "--resume"
            ) from error

    def _selected(self, path: Path, ranks: Ranks) -> checkpoints.Newest:
        try:
            return checkpoints.Newest(path, load_together(path, ranks), [])
        except ValueError as error:
            own = ranks.first_does(lambda: self.holds(path))
            way = "--resume latest takes an earlier one" if own else "name another checkpoint of its run"
            raise ValueError(f"{error}; {way}") from error

    def history(self) -> dict[str, list[Record]]:
        """The records of the run by kind."""
        return {kind: read_records(self.root / f"{kind}.jsonl") for kind in KINDS}

    def _parts(self) -> list[str]:
        return [name for name in _PARTS if os.path.lexists(self.root / name)]

    def _discard(self, parts: list[str]) -> None:
        """Moves them away first, so that a kill in between leaves no half of a run that could be resumed: who takes the
        lock next moves the rest (``_finish_discarding``)."""
        if not parts:
            return
        discarding = self.root / _DISCARDING
        discarding.mkdir()
        for name in parts:
            (self.root / name).rename(discarding / name)
        remove_directory(discarding)

    def _finish_discarding(self) -> None:
        """After a process was killed in ``_discard``. Its first part are the checkpoints: where there are some, it has
        moved nothing yet, or the run has been restored since; and so has a part that it has moved."""
        discarding = self.root / _DISCARDING
        if discarding.is_symlink():
            discarding.unlink()
        if not discarding.is_dir():
            return
        for name in [] if checkpoints.held_in(self.checkpoints) else self._parts():
            if not os.path.lexists(discarding / name):
                (self.root / name).rename(discarding / name)
        remove_directory(discarding)
