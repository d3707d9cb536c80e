"""The faults: those that are injected while a run trains, and damage to its files between two starts.

A fault acts on a campaign and its current start, and returns the endings that are correct after it. "crashed" is one of
them only where a rank has lost another one: it ends within the timeout and not with 0; how it says so is torch's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checks import Checkpoints, logged_steps, whole_lines
from workload import RANK_TIMEOUT

from clipup.atomic_files import replace_files

if TYPE_CHECKING:
    from campaign import Campaign

MOMENTS = ("in start-up", "in training", "while a checkpoint is written", "in the last seconds")
LOST = {"refused", "killed", "crashed"}
DISK_SIZE = 64 << 20
Strike = Callable[[Path, random.Random], str | None]


class Missed(Exception):
    """The run ended before the fault could be injected."""


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Campaign], set[str]]
    weight: float = 1
    processes: tuple[int, ...] = (1, 2)
    moments: tuple[str, ...] = MOMENTS
    needs_disk: bool = False
    ends: bool = True
    """Whether it ends the start, as a rule."""


@dataclass(frozen=True)
class Damage:
    name: str
    strike: Strike
    """Damages a run directory and returns how; None if there is nothing to damage."""
    weight: float = 1
    passing: bool = False
    """Whether the file itself is intact, so that refusing is correct even if there is an older checkpoint."""


class SmallDisk:
    """A tmpfs of a few megabytes: ``fill`` leaves a number of free bytes, ``empty`` frees all.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: it cannot be mounted here.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "none", str(path)]
        subprocess.run(command, check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True, capture_output=True)

    def fill(self, room: int) -> None:
        with open(self._ballast, "wb") as file:
            status = os.statvfs(self.path)
            with contextlib.suppress(OSError):  # the run writes too
                os.posix_fallocate(file.fileno(), 0, max(status.f_bavail * status.f_frsize - room, 1))

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


def _signal(number: int, whom: str, times: int = 1) -> Callable[[Campaign], set[str]]:
    """Sends a signal. Processes that survive SIGKILL may end with one message; SIGINT and SIGTERM save first."""

    def strike(it: Campaign) -> set[str]:
        start, begun = it.start, it.start.resumed_at() is not None
        if whom == "the process":
            pids = [start.pid]
        elif whom == "all processes":
            pids = start.alive()
        else:
            pids = [it.one_of(start.ranks() if whom == "a rank" else start.data_workers(), whom)]
        for _ in range(times):
            start.send(number, *pids)
            time.sleep(0.05 * (times > 1))
        several, everything = start.several, whom == "all processes"
        if number == signal.SIGKILL:
            lost = LOST if several else {"refused"} if whom == "a data worker" else set()
            return (
                {"finished"} | (set() if everything else lost) | (set() if whom == "a rank" and begun else {"killed"})
            )
        if whom == "a data worker":
            return {"refused", "finished", "stopped"} | (LOST if several else set())
        twice = times > 1 or (several and everything)  # torchrun forwards its own
        late = logged_steps(it.directory) >= it.workload.steps
        allowed = {"stopped", "finished"} | ({"interrupted", "killed"} if twice or late or not begun else set())
        return allowed | (LOST if several and (twice or not begun) else set())  # a rank may end before the other one

    return strike


def _freeze(it: Campaign) -> set[str]:
    pid = it.one_of(it.start.alive(), "process")
    it.start.send(signal.SIGSTOP, pid)
    time.sleep(it.draw.uniform(0.05, 1.5))
    it.start.send(signal.SIGCONT, pid)
    return {"finished"}


def _freeze_for_long(it: Campaign) -> set[str]:
    """The other ranks end without help, and then torchrun ends the frozen one; or they wait for what rank 0 does alone,
    and the run goes on."""
    pid, others = it.one_of(it.start.ranks(), "rank"), set()
    it.start.send(signal.SIGSTOP, pid)
    until = time.monotonic() + 3 * RANK_TIMEOUT
    while it.start.running and (others := set(it.start.ranks()) - {pid}) and time.monotonic() < until:
        time.sleep(0.1)
    it.start.send(signal.SIGCONT, pid)
    return {"finished"} if others else LOST


def _limit_files(it: Campaign) -> set[str]:
    """Limits the size of files that ranks write. Data workers would skip what they cannot read."""
    size = int(10 ** it.draw.uniform(3, 6.7))
    it.tell(f"files are limited to {size} bytes")
    for pid in it.start.ranks():
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
        except ProcessLookupError:
            raise Missed from None
    return {"refused", "finished"}


def _fill_disk(it: Campaign) -> set[str]:
    room = int(10 ** it.draw.uniform(2, 6.7))
    it.tell(f"{room} bytes left on the disk")
    it.disk.fill(room)
    return {"refused", "finished"}


def _second_start(*options: str, frozen: bool) -> Callable[[Campaign], set[str]]:
    """Starts a second run on the same directory: one of the two must train, the other must refuse."""

    def strike(it: Campaign) -> set[str]:
        began, ranks = time.monotonic(), it.start.ranks()
        if frozen:
            it.start.send(signal.SIGSTOP, *ranks)
        second = it.begin(*options)
        ended = second.wait(120)
        it.start.send(signal.SIGCONT, *ranks)
        ending = second.ending() if ended else "running"
        it.tell(f"the second one: {ending}")
        second.clear(seconds=15 if ended else 0)
        if ending == "refused":
            timed_out = it.start.several and time.monotonic() - began > RANK_TIMEOUT / 2
            return {"finished"} | (LOST if timed_out else set())
        if not frozen and ending == "finished":  # it was first, or started after the end of the other
            return {"refused", "finished"}
        raise AssertionError(f"of two starts of one run the second is {ending}: {second.said().strip()[-2000:]}")

    return strike


def _file_of(path: Path, draw: random.Random) -> Path:
    """A checkpoint's file, or one of a sharded checkpoint's."""
    return draw.choice(sorted(path.iterdir())) if path.is_dir() else path


def _newest(how: Callable[[bytes, random.Random], bytes]) -> Strike:
    """Damage to the newest checkpoint, under one of its names or under all."""

    def strike(run: Path, draw: random.Random) -> str | None:
        newest = Checkpoints.of(run).newest()
        if not newest:
            return None
        path, in_place = _file_of(draw.choice(newest), draw), draw.random() < 0.5
        content = how(path.read_bytes(), draw)
        if not in_place:
            path.unlink()
        path.write_bytes(content)
        return (
            f"{path.relative_to(run / 'checkpoints')} {how.__name__[1:]}{', with its other names' if in_place else ''}"
        )

    return strike


def _truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _emptied(content: bytes, draw: random.Random) -> bytes:
    return b""


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    start = 0 if draw.random() < 0.3 else draw.randrange(len(content))
    end = min(len(content), start + int(4096 * 10 ** draw.uniform(0, 3)))
    return content[:start] + bytes(end - start) + content[end:]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    bit = draw.randrange(8 * len(content))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def _replaced(content: bytes, draw: random.Random) -> bytes:
    return b"<html><body>503 Service Unavailable</body></html>\n"


def _all_checkpoints(run: Path, draw: random.Random) -> str | None:
    paths = [_file_of(path, draw) for path in Checkpoints.of(run).steps]
    for path in paths:
        content = _truncated(path.read_bytes(), draw)
        path.unlink()
        path.write_bytes(content)
    return f"all {len(paths)} checkpoints truncated" if paths else None


def _read_error(run: Path, draw: random.Random) -> str | None:
    """Reading the newest checkpoint gives EIO, as /proc/self/mem does at its start."""
    newest = [_file_of(path, draw) for path in Checkpoints.of(run).newest()]
    for path in newest:
        path.unlink()
        path.symlink_to("/proc/self/mem")
    return f"{' and '.join(path.name for path in newest)} give an I/O error" if newest else None


def _cut_records(name: str) -> Strike:
    """Truncates the last line if its step is computed again; otherwise appends a truncated line."""

    def strike(run: Path, draw: random.Random) -> str | None:
        lines = whole_lines(run / name)
        if not lines:
            return None
        again = json.loads(lines[-1])["step"] > (Checkpoints.of(run).step or 0)
        kept = lines[-1][: draw.randrange(1, len(lines[-1]))]
        (run / name).write_bytes(b"".join(lines[:-1] if again else lines) + kept)
        return f"{name} ends {len(kept)} bytes into a line"

    return strike


def _leftovers(run: Path, draw: random.Random) -> str | None:
    """Files of writers that were killed while writing; the next start must remove them."""
    targets = [run / "metrics.jsonl", run / "checkpoints" / "epoch_latest.pt", run / "model" / "README.md"]
    killed = [path for path in targets if path.parent.is_dir() and draw.random() < 0.7]
    for path in killed:
        if (child := os.fork()) == 0:
            replace_files({path: _half_written})
        os.waitpid(child, 0)
    return f"killed while writing: {', '.join(path.name for path in killed)}" if killed else None


def _half_written(path: Path) -> None:
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)


def _cut_options(run: Path, draw: random.Random) -> str | None:
    path = run / "options.json"
    if not path.is_file():
        return None
    os.truncate(path, draw.randrange(path.stat().st_size))
    return "options.json truncated"


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
    Damage("options.json truncated", _cut_options, 0.3),
)

TRAINING, WRITING = MOMENTS[1:], MOMENTS[1:3]
FAULTS = (
    Fault("no fault", lambda it: {"finished"}, 0.5, ends=False),
    Fault("SIGKILL of the process", _signal(signal.SIGKILL, "the process"), 3, (1,)),
    Fault("SIGKILL of torchrun", _signal(signal.SIGKILL, "the process"), 1, (2,)),
    Fault("SIGKILL of a rank", _signal(signal.SIGKILL, "a rank"), 1, (2,)),
    Fault("SIGKILL of all processes", _signal(signal.SIGKILL, "all processes"), 2),
    Fault("SIGKILL of a data worker", _signal(signal.SIGKILL, "a data worker"), 0.5, moments=WRITING),
    Fault("SIGTERM to the process", _signal(signal.SIGTERM, "the process")),
    Fault("SIGTERM to all processes", _signal(signal.SIGTERM, "all processes")),
    Fault("SIGTERM to a rank", _signal(signal.SIGTERM, "a rank"), 1, (2,)),
    Fault("SIGTERM to a data worker", _signal(signal.SIGTERM, "a data worker"), 0.5, moments=WRITING),
    Fault("SIGINT to the process", _signal(signal.SIGINT, "the process")),
    Fault("SIGINT to all processes", _signal(signal.SIGINT, "all processes")),
    Fault("SIGINT to a rank", _signal(signal.SIGINT, "a rank"), 1, (2,)),
    Fault("SIGINT twice", _signal(signal.SIGINT, "the process", 2), 0.5),
    Fault("SIGTERM twice", _signal(signal.SIGTERM, "the process", 2), 0.5),
    Fault("a process frozen and woken", _freeze, ends=False),
    Fault("a rank frozen for longer than the others wait", _freeze_for_long, 0.5, (2,), WRITING),
    Fault("file size limit", _limit_files, moments=WRITING),
    Fault("disk full", _fill_disk, 3, moments=TRAINING, needs_disk=True),
    Fault(
        "second start beside a frozen run",
        _second_start("--resume", "latest", frozen=True),
        0.7,
        moments=WRITING,
        ends=False,
    ),
    Fault("second start with --force", _second_start("--force", frozen=True), 0.4, moments=WRITING, ends=False),
    Fault(
        "two starts at once", _second_start("--resume", "latest", frozen=False), 0.7, moments=MOMENTS[:1], ends=False
    ),
)
