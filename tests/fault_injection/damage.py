"""Damage to the files of a run between two starts, as a crash of the machine or a bad disk causes it."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checks import Checkpoints, lines

from clipup.atomic_files import replace_files


@dataclass(frozen=True)
class Damage:
    name: str
    strike: Callable[[Path, random.Random], str | None]
    """Damages a run directory and returns how; None if there is nothing to damage."""
    weight: float = 1
    passing: bool = False
    """Whether the file itself is intact, so that refusing is correct even if there is an older checkpoint."""


def _change(path: Path, change: Callable[[bytearray], bytes], in_place: bool) -> None:
    """``in_place`` also changes other names of the same file."""
    content = bytes(change(bytearray(path.read_bytes())))
    if not in_place:
        path.unlink()
    path.write_bytes(content)


def _file_of(path: Path, draw: random.Random) -> Path:
    """A checkpoint's file, or one of a sharded checkpoint's."""
    return draw.choice(sorted(path.iterdir())) if path.is_dir() else path


def _newest(
    how: Callable[[bytearray, random.Random], tuple[bytes, str]],
) -> Callable[[Path, random.Random], str | None]:
    """Damage to the newest checkpoint, under one of its names or under all."""

    def strike(run: Path, draw: random.Random) -> str | None:
        newest = Checkpoints.of(run).newest()
        if not newest:
            return None
        path, in_place, said = _file_of(draw.choice(newest), draw), draw.random() < 0.5, ""

        def change(content: bytearray) -> bytes:
            nonlocal said
            content, said = how(content, draw)
            return content

        _change(path, change, in_place)
        names = ", with its other names" if in_place and len(newest) > 1 else ""
        return f"{path.relative_to(run / 'checkpoints')} {said}{names}"

    return strike


def _truncated(content: bytearray, draw: random.Random) -> tuple[bytes, str]:
    size = draw.randrange(len(content))
    return content[:size], f"cut to {size} of {len(content)} bytes"


def _emptied(content: bytearray, draw: random.Random) -> tuple[bytes, str]:
    return b"", "emptied"


def _zeroed(content: bytearray, draw: random.Random) -> tuple[bytes, str]:
    start = 0 if draw.random() < 0.3 else draw.randrange(len(content))
    end = min(len(content), start + int(4096 * 10 ** draw.uniform(0, 3)))
    content[start:end] = bytes(end - start)
    return content, f"zeroed from byte {start} to {end}"


def _flipped(content: bytearray, draw: random.Random) -> tuple[bytes, str]:
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    return content, f"with bit {bit % 8} of byte {bit // 8} of {len(content)} flipped"


def _replaced(content: bytearray, draw: random.Random) -> tuple[bytes, str]:
    return b"<html><body>503 Service Unavailable</body></html>\n", "replaced by a page of HTML"


def _all_checkpoints(run: Path, draw: random.Random) -> str | None:
    paths = list(Checkpoints.of(run).steps)
    for path in paths:
        _change(_file_of(path, draw), lambda content: _truncated(content, draw)[0], in_place=False)
    return f"all {len(paths)} checkpoints truncated" if paths else None


def _read_error(run: Path, draw: random.Random) -> str | None:
    """Reading the newest checkpoint gives EIO, as /proc/self/mem does at its start."""
    newest = [_file_of(path, draw) for path in Checkpoints.of(run).newest()]
    for path in newest:
        path.unlink()
        path.symlink_to("/proc/self/mem")
    return f"{' and '.join(path.name for path in newest)} give an I/O error" if newest else None


def _cut_records(name: str) -> Callable[[Path, random.Random], str | None]:
    """Truncates the last line if its step is computed again; otherwise appends a truncated line."""

    def strike(run: Path, draw: random.Random) -> str | None:
        path = run / name
        records = lines(path)
        if not records:
            return None
        text = path.read_bytes()
        last = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)[-1]
        if records[-1]["step"] > (Checkpoints.of(run).step or 0):
            text = text[: text.rfind(b"\n") + 1 - len(last)]
        kept = last[: draw.randrange(1, len(last))]
        path.write_bytes(text[: text.rfind(b"\n") + 1] + kept)
        return f"{name} ends {len(kept)} bytes into a line"

    return strike


def _leftovers(run: Path, draw: random.Random) -> str | None:
    """Files of writers that were killed while writing; the next start must remove them."""
    targets = [run / "metrics.jsonl", run / "checkpoints" / "epoch_latest.pt", run / "model" / "README.md"]
    killed = [path for path in targets if path.parent.is_dir() and draw.random() < 0.7]
    for path in killed:
        if (child := os.fork()) == 0:
            replace_files({path: _half_written})
            os._exit(0)
        os.waitpid(child, 0)
    return f"killed while writing: {', '.join(path.name for path in killed)}" if killed else None


def _half_written(path: Path) -> None:
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)


def _empty_options(run: Path, draw: random.Random) -> str | None:
    path = run / "options.json"
    if not path.is_file():
        return None
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"options.json cut to {size} bytes"


DAMAGE = (
    Damage("checkpoint truncated", _newest(_truncated)),
    Damage("checkpoint emptied", _newest(_emptied), 0.5),
    Damage("checkpoint zeroed", _newest(_zeroed)),
    Damage("checkpoint with a flipped bit", _newest(_flipped), 1.5),
    Damage("checkpoint of another format", _newest(_replaced), 0.5),
    Damage("all checkpoints truncated", _all_checkpoints, 0.7),
    Damage("I/O error at a checkpoint", _read_error, 0.7, passing=True),
    Damage("metrics.jsonl cut in a line", _cut_records("metrics.jsonl")),
    Damage("evaluations.jsonl cut in a line", _cut_records("evaluations.jsonl"), 0.5),
    Damage("leftovers of dead writers", _leftovers),
    Damage("options.json truncated", _empty_options, 0.3),
)


class Backup:
    """A copy of a run's files from before they were damaged."""

    def __init__(self, run: Path, where: Path) -> None:
        self._run, self._where = run, where
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(run, where, symlinks=True)

    def restore(self) -> None:
        shutil.rmtree(self._run)
        shutil.copytree(self._where, self._run, symlinks=True)
