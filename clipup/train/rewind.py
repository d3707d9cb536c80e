"""A run that goes back to one of its earlier checkpoints: what came after it is moved aside, and nothing is deleted."""

from __future__ import annotations

import itertools
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..atomic_files import replace_files
from . import checkpoints, sharded_checkpoints
from .recorder import KINDS

ASIDE = "before_rewind_"
"""Prefix of the directories beside the checkpoints; with a number from 1 on."""


@dataclass(frozen=True)
class Rewind:
    """What was moved aside, and can be moved back."""

    aside: Path
    moved: tuple[Path, ...]
    """Checkpoints and the model directory, by their paths before."""
    copied: tuple[Path, ...]
    """Records, and for sharded checkpoints the file that names the newest."""
    rewinds: int
    """How often the run has gone back, with this time."""

    def undo(self) -> None:
        """Makes the run what it was before ``go_back``.

        Raises:
            OSError: something could not be moved or copied; it is still in ``aside``.
        """
        replace_files({path: partial(shutil.copyfile, self.aside / path.name) for path in self.copied})
        self.move_back()

    def move_back(self) -> None:
        for path in reversed(self.moved):
            if (self.aside / path.name).exists():
                (self.aside / path.name).rename(path)
        shutil.rmtree(self.aside)


def go_back(root: Path, resumed: Path) -> Rewind | None:
    """Moves the checkpoints that a run has after ``resumed``, and its model, into a new directory where no run looks
    for them, with a copy of the records: what follows is trained anew. None if there are no such checkpoints.

    The newest is moved last: after a kill in between, it is still the one that the run continues from.

    Raises:
        OSError: something could not be read, copied or moved.
    """
    folder = resumed.parent
    later, begin = checkpoints.after(resumed)
    if not later:
        return None
    aside = next(path for n in itertools.count(1) if not (path := folder / f"{ASIDE}{n}").exists())
    aside.mkdir()
    pointer = folder / sharded_checkpoints.POINTER
    copied = tuple(path for path in (*(root / f"{kind}.jsonl" for kind in KINDS), pointer) if path.is_file())
    model = root / "model"
    moved = (*later[:-1], *([model] if model.is_dir() else []), later[-1])
    rewind = Rewind(aside, moved, copied, begin.rewinds + 1)
    try:
        for path in copied:
            shutil.copyfile(path, aside / path.name)
        for path in moved:
            path.rename(aside / path.name)
        if resumed.is_dir():
            sharded_checkpoints.name_newest(resumed, begin.step)
        elif pointer.is_file():
            pointer.unlink()  # of directories that are aside now
    except OSError:
        with suppress(OSError):
            rewind.move_back()
        raise
    return rewind
