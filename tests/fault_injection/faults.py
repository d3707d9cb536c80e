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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from checks import RECORDS, checkpoints, logged_steps
from starts import Start
from workload import LONGEST, RANK_TIMEOUT, STEPS

from clipup.atomic_files import replace_files

if TYPE_CHECKING:
    from campaign import Campaign

LOST = {"refused", "killed", "crashed"}


class Missed(Exception):
    """The run ended before the fault could be injected."""


class Fault(NamedTuple):
    """strike raises Missed if there is nothing to strike."""

    strike: Callable[[Campaign], set[str]]
    processes: tuple[int, ...] = (1, 2)
    in_startup: bool = True
    """Whether it may come before training has begun."""


class SmallDisk:
    """A tmpfs of a few megabytes.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: it cannot be mounted here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={64 << 20}", "none", path], check=True, capture_output=True
        )

    def fill(self, room: int) -> None:
        """Leaves a number of free bytes."""
        with open(self.path / "ballast", "wb") as file, contextlib.suppress(OSError):  # the run writes too
            status = os.statvfs(self.path)
            os.posix_fallocate(file.fileno(), 0, max(status.f_bavail * status.f_frsize - room, 1))

    def empty(self) -> None:
        (self.path / "ballast").unlink(missing_ok=True)


def _signal(number: int, whom: str, times: int = 1) -> Callable[[Campaign], set[str]]:
    """Sends a signal. Processes that survive SIGKILL may end with one message; SIGINT and SIGTERM save first."""

    def strike(it: Campaign) -> set[str]:
        start, begun = it.start, it.start.resumed_at() is not None
        pids = [it.one_of(whom)] if whom.startswith("a ") else start.processes()[whom]
        for _ in range(times):
            start.send(number, *pids)
            time.sleep(0.05 * (times > 1))
        worker, everything = whom == "a data worker", whom == "all processes"
        lost = LOST if start.several else {"refused"} if worker else set()
        if number == signal.SIGKILL:
            return {"finished", "killed"} | (set() if everything else lost)
        if worker:
            return {"refused", "finished", "stopped"} | lost
        unsure = not begun or times > 1 or (start.several and everything)  # torchrun forwards its own
        late = logged_steps(it.directory) >= STEPS
        allowed = {"stopped", "finished"} | ({"interrupted", "killed"} if unsure or late else set())
        return allowed | (lost if unsure else set())  # a rank may end before the other one

    return strike


def _freeze(longest: float) -> Callable[[Campaign], set[str]]:
    """Stops a rank for a time. If that is long, the other ranks end without help, and then torchrun ends the frozen
    one; or they wait for what rank 0 does alone, and the run goes on."""

    def strike(it: Campaign) -> set[str]:
        pid, until = it.one_of("a rank"), time.monotonic() + it.draw.uniform(longest / 2, longest)
        it.start.send(signal.SIGSTOP, pid)
        while it.start.processes()["a rank"] not in ([], [pid] * it.start.several) and time.monotonic() < until:
            time.sleep(0.05)
        it.start.send(signal.SIGCONT, pid)
        return {"finished"} | (LOST if longest > RANK_TIMEOUT else set())

    return strike


def _limit_files(it: Campaign) -> set[str]:
    """Limits the size of files that ranks write. Data workers would skip what they cannot read."""
    size = int(10 ** it.draw.uniform(3, 6.7))
    it.tell(f"files are limited to {size} bytes")
    for pid in it.start.processes()["a rank"]:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    return {"refused", "finished"}


def _fill_disk(it: Campaign) -> set[str]:
    room = int(10 ** it.draw.uniform(2, 6.7))
    it.tell(f"{room} bytes left on the disk")
    it.disk.fill(room)
    return {"refused", "finished"}


def _second_start(it: Campaign) -> set[str]:
    """Starts a second run on the directory while the first one is frozen. It must refuse."""
    began, ranks = time.monotonic(), it.start.processes()["a rank"]
    if logged_steps(it.directory) >= STEPS or not ranks:
        raise Missed
    it.start.send(signal.SIGSTOP, *ranks)
    options = it.draw.choice([("--force",), ("--resume", "latest")])
    second = Start(it.workload.command(it.directory, *options), it.workload.processes, it.scratch)
    ending = "running" if second.wait(LONGEST) else second.ending()
    it.start.send(signal.SIGCONT, *ranks)
    assert ending == "refused", f"a second start with {options} is {ending}: {second.said()[-2000:]}"
    return {"finished"} | (LOST if it.start.several and time.monotonic() - began > RANK_TIMEOUT / 2 else set())


def _spoil(how: str, every: bool = False) -> Callable[[Path, random.Random], str]:
    """Damage to the newest checkpoint, under one of its names or under all, or to every checkpoint."""

    def strike(run: Path, draw: random.Random) -> str:
        found = checkpoints(run)
        paths = [path for path, step in found.items() if every or step == max(found.values())]
        for path in paths if every else [draw.choice(paths)]:
            file = draw.choice(sorted(path.iterdir())) if path.is_dir() else path
            content = file.read_bytes()
            cut, bit = draw.choice((0, draw.randrange(len(content)))), draw.randrange(8 * len(content))
            zeros = bytes(min(len(content) - cut, int(4096 * 10 ** draw.uniform(0, 3))))
            flipped = bytes([content[bit // 8] ^ 1 << bit % 8])
            damaged = {
                "truncated": content[:cut],
                "zeroed": content[:cut] + zeros + content[cut + len(zeros) :],
                "with a flipped bit": content[: bit // 8] + flipped + content[bit // 8 + 1 :],
                "replaced": b"<html><body>503 Service Unavailable</body></html>\n",
            }
            if draw.random() < 0.5:
                file.unlink()  # its other names stay intact
            file.write_bytes(damaged[how])
        return f"{file.relative_to(run / 'checkpoints')}{' and all others' * every} {how}"

    return strike


def unreadable(run: Path, draw: random.Random) -> str:
    """Reading the newest checkpoint gives EIO, as /proc/self/mem does at its start. The files may be intact, so that
    refusing is correct even if there is an older checkpoint."""
    found = checkpoints(run)
    for path in (path for path, step in found.items() if step == max(found.values())):
        file = draw.choice(sorted(path.iterdir())) if path.is_dir() else path
        file.unlink()
        file.symlink_to("/proc/self/mem")
    return f"{file.name} gives an I/O error"


def _cut_records(run: Path, draw: random.Random) -> str:
    """Appends a truncated line."""
    name, line = draw.choice(RECORDS), b'{"step": 1, "loss": 2.718281828459045, "note": "\xc3\xa4"}'
    with (run / name).open("ab") as file:
        size = file.write(line[: draw.randrange(1, len(line))])
    return f"{name} ends {size} bytes into a line"


def _cut_options(run: Path, draw: random.Random) -> str:
    text = (run / "options.json").read_bytes()
    (run / "options.json").write_bytes(text[: draw.randrange(len(text))])
    return "options.json truncated"


def _leftovers(run: Path, draw: random.Random) -> str:
    """Files of writers that were killed while writing; the next start must remove them."""
    for path in (run / "metrics.jsonl", run / "checkpoints" / "epoch_latest.pt"):
        if (child := os.fork()) == 0:
            replace_files({path: lambda path: (path.write_bytes(bytes(1000)), os.kill(os.getpid(), signal.SIGKILL))})
        os.waitpid(child, 0)
    return "killed while writing metrics.jsonl and a checkpoint"


DAMAGE = {f"checkpoint {how}": _spoil(how) for how in ("truncated", "zeroed", "with a flipped bit", "replaced")} | {
    "all checkpoints truncated": _spoil("truncated", every=True),
    "I/O error at a checkpoint": unreadable,
    "records cut in a line": _cut_records,
    "leftovers of dead writers": _leftovers,
    "options.json truncated": _cut_options,
}
FAULTS = (
    {"no fault": Fault(lambda it: {"finished"})}
    | {
        f"{number.name} to {whom}": Fault(_signal(number, whom), (2,) if whom == "a rank" else (1, 2))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        for whom in ("the process", "all processes", "a rank")
    }
    | {
        "SIGKILL to a data worker": Fault(_signal(signal.SIGKILL, "a data worker"), in_startup=False),
        "SIGTERM to a data worker": Fault(_signal(signal.SIGTERM, "a data worker"), in_startup=False),
        "SIGINT twice": Fault(_signal(signal.SIGINT, "the process", 2)),
        "SIGTERM twice": Fault(_signal(signal.SIGTERM, "the process", 2)),
        "a rank frozen and woken": Fault(_freeze(1.5)),
        "a rank frozen for longer than the others wait": Fault(_freeze(3 * RANK_TIMEOUT), (2,), in_startup=False),
        "file size limit": Fault(_limit_files, in_startup=False),
        "disk full": Fault(_fill_disk, in_startup=False),
        "second start beside a frozen run": Fault(_second_start, in_startup=False),
    }
)
