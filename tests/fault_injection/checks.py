"""What is in a run's directory, and how it differs from the uninterrupted run's."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from clipup.models.state_dicts import read_pickle
from clipup.train.checkpoints import sharded

_CHECKPOINT = re.compile(r"epoch_(\d+|latest)\.pt|(epoch|step)_\d+")
_CLOCK = ("seconds", "images_per_second", "batch_time", "data_time", "step_time")
_MAY_DIFFER = ("seconds", "name")


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, a file or a sharded one, whose checksums are all correct, else None."""
    try:
        if path.is_dir():
            return sharded.load(path)
        with zipfile.ZipFile(path) as archive:
            return read_pickle(path) if archive.testzip() is None else None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None


@dataclass
class Checkpoints:
    """The checkpoints of a run directory, sorted by whether they can be read."""

    steps: dict[Path, int]
    """The intact ones, and the step after which each was written."""
    damaged: dict[Path, str]
    """The damaged ones, and the digest of each."""
    not_finite: list[Path]

    @classmethod
    def of(cls, run: Path) -> Checkpoints:
        paths = [path for path in sorted((run / "checkpoints").glob("*_*")) if _CHECKPOINT.fullmatch(path.name)]
        states = {path: read_checkpoint(path) for path in paths}
        whole = {path: state for path, state in states.items() if state is not None}
        damaged = {path: digest(path) for path in paths if path not in whole}
        steps = {path: state["step"] for path, state in whole.items()}
        return cls(steps, damaged, [path for path, state in whole.items() if not _is_finite(state)])

    @property
    def step(self) -> int | None:
        """The largest step of an intact one."""
        return max(self.steps.values(), default=None)

    def newest(self) -> list[Path]:
        return [path for path, step in self.steps.items() if step == self.step]


def _is_finite(state: dict[str, Any]) -> bool:
    return all(leaf.isfinite().all() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def digest(path: Path) -> str:
    """Of a file, or of the files of a directory."""
    try:
        if path.is_dir():
            return " ".join(f"{each.name}: {digest(each)}" for each in sorted(path.iterdir()))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return error.__class__.__name__


def contents(run: Path) -> dict[str, str]:
    """A digest of every file that a start without training must not change. It may append to out.log, and remove locks
    and half-written files of dead writers."""
    files = {path.relative_to(run): path for path in run.rglob("*") if path.is_file()}
    return {
        name.as_posix(): digest(path)
        for name, path in files.items()
        if name.name not in ("out.log", ".lock") and not any(part.endswith(".tmp") for part in name.parts)
    }


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file without a truncated last one."""
    text = path.read_bytes() if path.is_file() else b""
    return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)


def logged_steps(run: Path) -> int:
    """The last step in metrics.jsonl."""
    lines = whole_lines(run / "metrics.jsonl")
    return json.loads(lines[-1])["step"] if lines else 0


def differences(run: Path, reference: Path, finished: bool, damaged: Set[Path] = frozenset()) -> list[str]:
    """What is wrong with a run, in words. Each step must be logged once, in order, with the reference's numbers;
    of a finished one, weights, optimizer, model and files must be the same as well.

    Args:
        damaged: checkpoints that were damaged and that the run had no reason to rewrite.
    """
    wrong = []
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        here, there = (_records(root / name) for root in (run, reference))
        if here != (there if finished else there[: len(here)]):
            other = [f"{one}, expected {two}" for one, two in zip(here, there, strict=False) if one != two]
            wrong.append(f"{name} differs: {len(here)} records for {len(there)}, {'; '.join(other[:1])}")
    if not finished:
        return wrong
    here, there = ({path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (run, reference))
    excused = {name for name in here | there if damaged & {run / name, (run / name).parent}}
    wrong += [f"{name} was left behind" for name in sorted(here - there - excused)]
    wrong += [f"{name} is missing" for name in sorted(there - here - excused)]
    for name in sorted(here & there - excused):
        if _CHECKPOINT.fullmatch(Path(name).name):
            wrong += _checkpoint_differs(name, *(read_checkpoint(root / name) for root in (run, reference)))
        elif name.startswith("model/") and digest(run / name) != digest(reference / name):
            wrong.append(f"{name} differs from the uninterrupted run's")
    return wrong


def _records(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in whole_lines(path)]
    return [{key: value for key, value in record.items() if key not in _CLOCK} for record in records]


def _checkpoint_differs(name: str, one: dict[str, Any] | None, other: dict[str, Any] | None) -> list[str]:
    """Of all but the clock, the run's name, and the learning rate, which is set again before its next use."""
    if one is None or other is None:
        return [f"{name} cannot be read"]
    for state in (one, other):
        for group in state["optimizer"].get("param_groups", ()):
            group.pop("lr", None)
    differ = [key for key in other if key not in _MAY_DIFFER and _values(one.get(key)) != _values(other[key])]
    return [f"{name} differs from the uninterrupted run's in {', '.join(differ)}"] if differ else []


def _values(state: Any) -> Any:
    """A state whose tensors are lists, so that it can be compared."""
    return pytree.tree_map_only(Tensor, lambda tensor: (tensor.dtype, tensor.tolist()), state)
