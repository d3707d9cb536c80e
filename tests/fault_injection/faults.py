"""The faults: those that are injected while a run trains, and damage to its files between two starts.

A fault acts on a campaign and its current start, and returns the endings that are correct after it. "crashed" is one of
them only where a rank has lost another one: it ends within the timeout and not with 0; how it says so is torch's.
"""

from __future__ import annotations

import contextlib
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

from checks import Checkpoints, logged_steps
from workload import RANK_TIMEOUT

from clipup.atomic_files import replace_files

if TYPE_CHECKING:
    from campaign import Campaign

MOMENTS = ("in start-up", "in training", "while a checkpoint is written", "in the last seconds")
LOST = {"refused", "killed", "crashed"}
DISK_SIZE = 64 << 20
Strike = Callable[[Path, random.Random], str]


class Missed(Exception):
    """The run ended before the fault could be injected."""


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Campaign], set[str]]
    weight: float = 1
    processes: tuple[int, ...] = (1, 2)
    moments: tuple[str, ...] = MOMENTS
    ends: bool = True
    """Whether it ends the start, as a rule."""


@dataclass(frozen=True)
class Damage:
    name: str
    strike: Strike
    """Damages the directory of a run that has a checkpoint, and returns how."""
    weight: float = 1


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
        found = {"the process": lambda: [start.pid], "all processes": start.alive}
        found |= {"a rank": start.ranks, "a data worker": start.data_workers}
        everything, worker = whom == "all processes", whom == "a data worker"
        pids = [it.one_of(found[whom](), whom)] if whom.startswith("a ") else found[whom]()
        for _ in range(times):
            start.send(number, *pids)
            time.sleep(0.05 * (times > 1))
        lost = LOST if start.several else {"refused"} if worker else set()
        if number == signal.SIGKILL:
            return {"finished", "killed"} | (set() if everything else lost)
        if worker:
            return {"refused", "finished", "stopped"} | lost
        twice = times > 1 or (start.several and everything)  # torchrun forwards its own
        late = logged_steps(it.directory) >= it.workload.steps
        allowed = {"stopped", "finished"} | ({"interrupted", "killed"} if twice or late or not begun else set())
        return allowed | (lost if twice or not begun else set())  # a rank may end before the other one

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
    while it.start.code is None and (others := set(it.start.ranks()) - {pid}) and time.monotonic() < until:
        time.sleep(0.1)
    it.start.send(signal.SIGCONT, pid)
    return {"finished"} if others else LOST


def _limit_files(it: Campaign) -> set[str]:
    """Limits the size of files that ranks write. Data workers would skip what they cannot read."""
    size = int(10 ** it.draw.uniform(3, 6.7))
    it.tell(f"files are limited to {size} bytes")
    for pid in it.start.ranks():
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    return {"refused", "finished"}


def fill_disk(it: Campaign) -> set[str]:
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
        said = f"of two starts of one run the second is {ending}: {second.said().strip()[-2000:]}"
        assert not frozen and ending == "finished", said
        return {"refused", "finished"}  # it was first, or started after the end of the other

    return strike


def _file_of(path: Path, draw: random.Random) -> Path:
    """A checkpoint's file, or one of a sharded checkpoint's."""
    return draw.choice(sorted(path.iterdir())) if path.is_dir() else path


def _rewrite(path: Path, how: str, draw: random.Random, in_place: bool = False) -> None:
    """in_place: the file's other names show the damage as well."""
    content = path.read_bytes()
    cut, bit = draw.randrange(len(content)), draw.randrange(8 * len(content))
    start = draw.choice((0, cut, cut))
    zeros = bytes(min(len(content) - start, int(4096 * 10 ** draw.uniform(0, 3))))
    if not in_place:
        path.unlink()
    damaged = {
        "truncated": content[:cut],
        "emptied": b"",
        "zeroed": content[:start] + zeros + content[start + len(zeros) :],
        "flipped": content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :],
        "replaced": b"<html><body>503 Service Unavailable</body></html>\n",
    }
    path.write_bytes(damaged[how])


def _newest(how: str) -> Strike:
    """Damage to the newest checkpoint, under one of its names or under all."""

    def strike(run: Path, draw: random.Random) -> str:
        path, in_place = _file_of(draw.choice(Checkpoints.of(run).newest()), draw), draw.random() < 0.5
        _rewrite(path, how, draw, in_place)
        return f"{path.relative_to(run / 'checkpoints')} {how}{', with its other names' if in_place else ''}"

    return strike


def _all_checkpoints(run: Path, draw: random.Random) -> str:
    paths = [_file_of(path, draw) for path in Checkpoints.of(run).steps]
    for path in paths:
        _rewrite(path, "truncated", draw)
    return f"all {len(paths)} checkpoints truncated"


def unreadable(run: Path, draw: random.Random) -> str:
    """Reading the newest checkpoint gives EIO, as /proc/self/mem does at its start. The files may be intact, so that
    refusing is correct even if there is an older checkpoint."""
    paths = [_file_of(path, draw) for path in Checkpoints.of(run).newest()]
    for path in paths:
        path.unlink()
        path.symlink_to("/proc/self/mem")
    return f"{' and '.join(path.name for path in paths)} give an I/O error"


def _cut_records(name: str) -> Strike:
    """Appends a truncated line."""

    def strike(run: Path, draw: random.Random) -> str:
        line = b'{"step": 1, "loss": 2.718281828459045, "note": "\xc3\xa4"}'
        with (run / name).open("ab") as file:
            size = file.write(line[: draw.randrange(1, len(line))])
        return f"{name} ends {size} bytes into a line"

    return strike


def _cut_options(run: Path, draw: random.Random) -> str:
    _rewrite(run / "options.json", "truncated", draw, in_place=True)
    return "options.json truncated"


def _leftovers(run: Path, draw: random.Random) -> str:
    """Files of writers that were killed while writing; the next start must remove them."""
    for path in (run / "metrics.jsonl", run / "checkpoints" / "epoch_latest.pt"):
        if (child := os.fork()) == 0:
            replace_files({path: _half_written})
        os.waitpid(child, 0)
    return "killed while writing metrics.jsonl and a checkpoint"


def _half_written(path: Path) -> None:
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)


DAMAGE = (
    Damage("checkpoint truncated", _newest("truncated")),
    Damage("checkpoint emptied", _newest("emptied"), 0.5),
    Damage("checkpoint zeroed", _newest("zeroed")),
    Damage("checkpoint with a flipped bit", _newest("flipped"), 1.5),
    Damage("checkpoint of another format", _newest("replaced"), 0.5),
    Damage("all checkpoints truncated", _all_checkpoints, 0.7),
    Damage("I/O error at a checkpoint", unreadable, 0.7),
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
    *(
        Fault(f"{number.name} to {whom}", _signal(number, whom), 1, (2,) if whom == "a rank" else (1, 2))
        for number in (signal.SIGTERM, signal.SIGINT)
        for whom in ("the process", "all processes", "a rank")
    ),
    Fault("SIGTERM to a data worker", _signal(signal.SIGTERM, "a data worker"), 0.5, moments=WRITING),
    Fault("SIGINT twice", _signal(signal.SIGINT, "the process", 2), 0.5),
    Fault("SIGTERM twice", _signal(signal.SIGTERM, "the process", 2), 0.5),
    Fault("a process frozen and woken", _freeze, ends=False),
    Fault("a rank frozen for longer than the others wait", _freeze_for_long, 0.5, (2,), WRITING),
    Fault("file size limit", _limit_files, moments=WRITING),
    Fault("disk full", fill_disk, 3, moments=TRAINING),
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
