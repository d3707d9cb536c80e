"""What is in a run's directory, and how it differs from the uninterrupted run's."""

import hashlib
import json
import re
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from clipup.models.state_dicts import read_pickle
from clipup.train.checkpoints import sharded

RECORDS = ("metrics.jsonl", "evaluations.jsonl")
_CHECKPOINT = re.compile(r"epoch_(\d+|latest)\.pt|(epoch|step)_\d+")
_CLOCK = ("seconds", "images_per_second", "batch_time", "data_time", "step_time")


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, a file or a sharded one, whose checksums are all correct, else None."""
    try:
        if path.is_dir():
            return sharded.load(path)
        with zipfile.ZipFile(path) as archive:
            return read_pickle(path) if archive.testzip() is None else None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None


def checkpoints(run: Path) -> dict[Path, int]:
    """The checkpoints of a run directory, and the step after which each was written; -1 for damaged ones."""
    paths = [path for path in sorted((run / "checkpoints").glob("*_*")) if _CHECKPOINT.fullmatch(path.name)]
    return {path: (read_checkpoint(path) or {"step": -1})["step"] for path in paths}


def newest_step(run: Path) -> int:
    """The largest step of an intact checkpoint, else 0."""
    return max([0, *checkpoints(run).values()])


def digests(run: Path) -> dict[str, str]:
    """A digest of every file that a refused start must not change. It may append to out.log, and remove locks and
    half-written files of dead writers."""
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file() and not path.is_symlink()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if name not in ("out.log", ".lock") and ".tmp" not in name
    }


def records(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, without the clock."""
    text = path.read_bytes() if path.is_file() else b""
    lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCK} for line in lines]


def logged_steps(run: Path) -> int:
    """The last step in metrics.jsonl."""
    return max([0, *(record["step"] for record in records(run / "metrics.jsonl")[-1:])])


def differences(run: Path, reference: Path, finished: bool, excused: Container[Path] = ()) -> list[str]:
    """Names of the files that differ. Each step must be logged once, in order, with the reference's numbers; of a
    finished run, weights, optimizer, model and files must be the same as well.

    Args:
        excused: checkpoints that were damaged and that the run had no reason to rewrite.
    """
    logs = {name: [records(root / name) for root in (run, reference)] for name in RECORDS}
    wrong = [name for name, (here, there) in logs.items() if here != there[: None if finished else len(here)]]
    here, there = ({path.relative_to(root) for path in root.rglob("*")} for root in (run, reference))
    for name in sorted(here | there) if finished else ():
        if run / name not in excused and run / name.parent not in excused:
            same = name in here and name in there and _value(run / name) == _value(reference / name)
            wrong += [] if same else [str(name)]
    return wrong


def _value(path: Path) -> Any:
    """What must be equal: of a checkpoint, all but the clock, the run's name, and the learning rate, which is set again
    before its next use; and the model's files."""
    if not _CHECKPOINT.fullmatch(path.name):
        return path.read_bytes() if path.parent.name == "model" else None
    state = read_checkpoint(path) or {"optimizer": {}}
    for group in state["optimizer"].get("param_groups", ()):
        group.pop("lr", None)
    rest = {key: value for key, value in state.items() if key not in ("seconds", "name")}
    return pytree.tree_map_only(Tensor, lambda tensor: (tensor.dtype, tensor.tolist()), rest)
