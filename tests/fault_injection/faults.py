"""Faults that are injected while a run trains.

A fault acts on a ``Scene`` and returns the endings that are correct after it. "crashed", which is a traceback or an
unknown exit code, is never one of them.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checks import Checkpoints, logged_steps
from disks import SmallDisk
from starts import Start
from workload import RANK_TIMEOUT

MOMENTS = ("in start-up", "in training", "while a checkpoint is written", "in the last seconds")
_WRITE_SECONDS = 0.02


class Missed(Exception):
    """The run ended before the fault could be injected."""


@dataclass
class Scene:
    """A start of ``clipup`` into which a fault is injected."""

    start: Start
    run: Path
    draw: random.Random
    disk: SmallDisk | None
    """The disk that holds the run, if it can be filled."""
    startup_seconds: float
    begin_another: Callable[..., Start]
    """Starts ``clipup`` a second time on the same run, with additional options."""
    before: Checkpoints
    steps: int
    """Of the whole run."""
    longest: float
    """Seconds after which a start that makes no progress hangs."""
    within: int = 20
    """Steps after the resumed one in which a fault is injected."""
    story: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.story.append(text)

    def reach(self, moment: str) -> None:
        """Waits for a moment; raises Missed if the run ends before it."""
        done = self.before.step or 0
        if moment == MOMENTS[0]:
            seconds = self.draw.uniform(0, self.startup_seconds)
            self.tell(f"{seconds:.2f} s after the start")
            until = time.monotonic() + seconds
            self._until(lambda: time.monotonic() >= until)
            return
        first, last = (min(done + more, self.steps) for more in (1, self.within))
        step = self.steps if moment == MOMENTS[3] else self.draw.randint(first, last)
        self._until(lambda: logged_steps(self.run) >= step and self._trains())
        if moment == MOMENTS[2]:
            self._until(self._writes)
        delay = self.draw.uniform(0, 1.5 if moment == MOMENTS[3] else _WRITE_SECONDS)
        time.sleep(delay)
        self.tell(f"{moment}, {1000 * delay:.0f} ms after step {logged_steps(self.run)}")

    def _until(self, reached: Callable[[], bool]) -> None:
        until = time.monotonic() + self.longest
        while not reached():
            if not self.start.running:
                raise Missed
            if time.monotonic() > until:
                raise TimeoutError(f"{self.start.describe()} makes no progress")
            time.sleep(0.001)

    def _trains(self) -> bool:
        """Whether lines in metrics.jsonl are from this start, and not from before a damaged checkpoint."""
        return started_from(self) is not None

    def _writes(self) -> bool:
        try:
            return any(entry.name.endswith(".tmp") for entry in os.scandir(self.run / "checkpoints"))
        except OSError:
            return False

    def one_of(self, pids: list[int], what: str) -> int:
        if not pids:
            raise Missed
        pid = self.draw.choice(pids)
        self.tell(f"{what} {pids.index(pid) + 1} of {len(pids)}")
        return pid


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Scene], set[str]]
    weight: float = 1
    processes: tuple[int, ...] = (1, 2)
    moments: tuple[str, ...] = MOMENTS
    needs: Callable[[Scene], bool] = lambda scene: True
    ends: bool = True
    """Whether it ends the start, as a rule."""


def _signal(number: int, whom: str, times: int = 1) -> Callable[[Scene], set[str]]:
    """Sends a signal. Processes that survive SIGKILL may end with one message; SIGINT and SIGTERM save first."""

    def strike(scene: Scene) -> set[str]:
        begun = started_from(scene) is not None
        start = scene.start
        if whom == "the process":
            pids = [start.pid]
        elif whom == "all processes":
            pids = start.alive()
        else:
            pids = [scene.one_of(start.ranks() if whom == "a rank" else start.data_workers(), whom)]
        for _ in range(times):
            start.send(number, *pids)
            time.sleep(0.05 * (times > 1))
        if number == signal.SIGKILL:
            lost_rank = whom == "a rank" and begun  # the other rank has to report it
            left = whom != "all processes" and (start.several or whom == "a data worker")
            return {"finished"} | ({"refused"} if left else set()) | (set() if lost_rank else {"killed"})
        if whom == "a data worker":
            return {"refused", "finished", "stopped"}
        allowed = {"stopped", "finished"}
        twice = times > 1 or (start.several and whom == "all processes")  # torchrun forwards its own
        if not begun or twice:
            allowed |= {"interrupted", "killed"}
        if start.several and twice:  # a rank may end before the other one
            allowed |= {"refused"}
        if logged_steps(scene.run) >= scene.steps:
            allowed |= {"killed", "interrupted"}
        return allowed

    return strike


def _freeze(scene: Scene) -> set[str]:
    pid = scene.one_of(scene.start.alive(), "process")
    seconds = scene.draw.uniform(0.05, 1.5)
    scene.tell(f"frozen for {seconds:.2f} s")
    scene.start.send(signal.SIGSTOP, pid)
    time.sleep(seconds)
    scene.start.send(signal.SIGCONT, pid)
    return {"finished"}


def _freeze_for_long(scene: Scene) -> set[str]:
    """The other ranks must end without help; then torchrun ends the frozen one."""
    pid = scene.one_of(scene.start.ranks(), "rank")
    scene.start.send(signal.SIGSTOP, pid)
    until = time.monotonic() + 3 * RANK_TIMEOUT
    while scene.start.running and set(scene.start.ranks()) - {pid} and time.monotonic() < until:
        time.sleep(0.1)
    ended = not set(scene.start.ranks()) - {pid}
    scene.start.send(signal.SIGCONT, pid)
    return {"refused"} if ended else set()


def _limit_files(scene: Scene) -> set[str]:
    """Limits the size of files that ranks write. Data workers would skip what they cannot read."""
    size = int(10 ** scene.draw.uniform(3, 6.7))
    scene.tell(f"files are limited to {size} bytes")
    for pid in scene.start.ranks():
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
        except ProcessLookupError:
            raise Missed from None
    return {"refused", "finished"}


def _fill_disk(scene: Scene) -> set[str]:
    assert scene.disk is not None
    room = int(10 ** scene.draw.uniform(2, 6.7))
    scene.tell(f"{room} bytes left on the disk")
    scene.disk.fill(room)
    return {"refused", "finished"}


def _second_start(*options: str, frozen: bool) -> Callable[[Scene], set[str]]:
    """Starts a second run on the same directory: one of the two must train, the other must refuse."""

    def strike(scene: Scene) -> set[str]:
        began = time.monotonic()
        if frozen:
            scene.start.send(signal.SIGSTOP, *scene.start.ranks())
        second = scene.begin_another(*options)
        ended = second.wait(120)
        scene.start.send(signal.SIGCONT, *scene.start.ranks())
        ending = second.ending() if ended else "running"
        scene.tell(f"the second one: {ending}, {second.messages()[:1]}")
        if not ended:
            second.send(signal.SIGKILL, *second.alive())
        second.clear(seconds=0 if not ended else 15)
        if ending == "refused":
            timed_out = scene.start.several and time.monotonic() - began > RANK_TIMEOUT / 2
            return {"finished", "refused"} if timed_out else {"finished"}
        if not frozen and ending == "finished":  # it was first, or started after the end of the other
            return {"refused", "finished"}
        raise AssertionError(f"of two starts of one run the second is {ending}: {second.said().strip()[-2000:]}")

    return strike


def _nothing(scene: Scene) -> set[str]:
    return {"finished"}


WRITING = MOMENTS[1:3]
FAULTS = (
    Fault("no fault", _nothing, 0.5, ends=False),
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
    Fault("file size limit", _limit_files, 1, moments=WRITING),
    Fault("disk full", _fill_disk, 3, moments=MOMENTS[1:], needs=lambda scene: scene.disk is not None),
    Fault(
        "second start beside a frozen run",
        _second_start("--resume", "latest", frozen=True),
        0.7,
        moments=MOMENTS[1:3],
        ends=False,
    ),
    Fault("second start with --force", _second_start("--force", frozen=True), 0.4, moments=MOMENTS[1:3], ends=False),
    Fault(
        "two starts at once", _second_start("--resume", "latest", frozen=False), 0.7, moments=MOMENTS[:1], ends=False
    ),
)


def started_from(scene: Scene) -> int | None:
    """The step after which this start began to train; None before it logs it."""
    return scene.start.resumed_at()
