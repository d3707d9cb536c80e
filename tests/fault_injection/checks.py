"""Checks of a run directory after faults; each check function returns what is wrong, in words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipup.models.state_dicts import read_pickle
from clipup.train.checkpoints import sharded

Record = dict[str, Any]
_CHECKPOINT = re.compile(r"epoch_(\d+|latest)\.pt|(epoch|step)_\d+")
_LONGEST_LINE = 1 << 16
_CLOCK = ("seconds", "images_per_second", "batch_time", "data_time", "step_time")


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, a file or a sharded one, whose checksums are all correct, else None."""
    if path.is_dir():
        try:
            return sharded.load(path)
        except (OSError, ValueError):
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        return read_pickle(path)
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
        steps, damaged, not_finite = {}, {}, []
        for path in sorted((run / "checkpoints").glob("*_*")):
            if not _CHECKPOINT.fullmatch(path.name):
                continue
            state = read_checkpoint(path)
            if state is None:
                damaged[path] = digest(path)
                continue
            steps[path] = state["step"]
            if not all(tensor.isfinite().all() for tensor in _floats(state)):
                not_finite.append(path)
        return cls(steps, damaged, not_finite)

    @property
    def step(self) -> int | None:
        """The largest step of an intact one."""
        return max(self.steps.values(), default=None)

    def newest(self) -> list[Path]:
        return [path for path, step in self.steps.items() if step == self.step]


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for child in children for tensor in _floats(child)]


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
        for name, path in sorted(files.items())
        if name.name not in ("out.log", ".lock") and not any(part.endswith(".tmp") for part in name.parts)
    }


def lines(path: Path) -> list[Record]:
    """The complete lines of a JSON-lines file; a truncated last line is left out."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def logged_steps(run: Path) -> int:
    """The last step in metrics.jsonl; cheap enough to ask a thousand times a second."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            end = file.read()
    except OSError:
        return 0
    whole = end[: end.rfind(b"\n") + 1].splitlines()
    return json.loads(whole[-1])["step"] if whole else 0


def records_differ(run: Path, reference: Path, complete: bool) -> list[str]:
    """Checks that each step is logged once, in order, with the numbers of the uninterrupted run."""
    wrong = []
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        try:
            here = [_without_clock(record) for record in lines(run / name)]
        except ValueError as error:
            wrong.append(f"{name} has a line that is not JSON: {error}")
            continue
        there = [_without_clock(record) for record in lines(reference / name)]
        if here == (there if complete else there[: len(here)]):
            continue
        steps = [[record.get("step") for record in records] for records in (here, there)]
        if steps[0] != steps[1][: len(steps[0])] or (complete and len(here) < len(there)):
            wrong.append(f"{name} has the steps {steps[0]}, expected {steps[1]}")
        else:
            step, key = next(
                (a["step"], key) for a, b in zip(here, there, strict=False) for key in b if a.get(key) != b[key]
            )
            wrong.append(f"{name} differs from the uninterrupted run at step {step} in {key}")
    return wrong


def _without_clock(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in _CLOCK}


def finished_run_differs(run: Path, reference: Path, excused: set[str]) -> list[str]:
    """Checks that a finished run equals the uninterrupted one in records, weights, optimizer, model, files.

    Args:
        excused: names of files that the harness damaged and that the run had no reason to rewrite.
    """
    wrong = records_differ(run, reference, complete=True)
    names = [{path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (run, reference)]
    excused = {name for name in names[0] | names[1] if excused & {name, Path(name).parent.as_posix()}}
    wrong += [f"{name} was left behind" for name in sorted(names[0] - names[1] - excused)]
    wrong += [f"{name} is missing" for name in sorted(names[1] - names[0] - excused)]
    for name in sorted(names[0] & names[1] - excused):
        if _CHECKPOINT.fullmatch(Path(name).name):
            wrong += _checkpoint_differs(name, run / name, reference / name)
        elif name.startswith("model/") and digest(run / name) != digest(reference / name):
            wrong.append(f"{name} differs from the uninterrupted run's")
    return wrong


def _checkpoint_differs(name: str, here: Path, there: Path) -> list[str]:
    one, other = read_checkpoint(here), read_checkpoint(there)
    if one is None or other is None:
        return [f"{name} cannot be read"]
    one, other = _what_counts(one), _what_counts(other)
    differ = [key for key in other if not _equal(one.get(key), other[key])]
    return [f"{name} differs from the uninterrupted run's in {', '.join(differ)}"] if differ else []


def _what_counts(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without the clock, the run's name, and the learning rate, which is set again before its next use."""
    optimizer = dict(state["optimizer"])
    if "param_groups" in optimizer:
        optimizer["param_groups"] = [
            {key: value for key, value in group.items() if key != "lr"} for group in optimizer["param_groups"]
        ]
    kept = {**state, "optimizer": optimizer}
    return {key: value for key, value in kept.items() if key not in ("seconds", "name")}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, dict):
        return (
            isinstance(one, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in other)
        )
    if isinstance(other, list | tuple):
        return isinstance(one, list | tuple) and len(one) == len(other) and all(map(_equal, one, other))
    return one == other
