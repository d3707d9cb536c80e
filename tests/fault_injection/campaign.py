"""Runs under faults: each is started repeatedly until it ends, and compared with the uninterrupted run."""

import argparse
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from checks import checkpoints, differences, digests, logged_steps, newest_step
from faults import DAMAGE, FAULTS, Missed, SmallDisk, unreadable
from starts import Start
from workload import LONGEST, STEPS, Workload

STARTUP_SECONDS = {1: 1.0, 2: 12.0}
"""About how long one process, a fork, and two, under torchrun, take to begin training."""


class Campaign:
    """The faults of one seed on a number of processes, in a directory of its own.

    An AssertionError of a method says that something was lost or wrong, or that a message was bad.
    """

    def __init__(self, options: argparse.Namespace, processes: int) -> None:
        """
        Args:
            options: those of ``inject.py``.
        """
        wanted = [name for name in (*FAULTS, *DAMAGE) if any(word in name for word in options.faults)]
        self.seed, self.scratch = options.seed, Path(tempfile.mkdtemp(prefix="clipup-faults-"))
        self.workload = Workload(self.scratch, processes, options.sharded)
        self.workload.make()
        self.faults = [name for name in wanted if name in FAULTS and processes in FAULTS[name].processes]
        self.damage = [name for name in wanted if name in DAMAGE]
        self.struck: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()
        """The rows of the figures below the faults."""
        self.place = self.scratch
        try:
            self.disk = SmallDisk(self.scratch / "disk")
            self.place = self.disk.path
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"SKIPPED: disk full ({error}); the limit on file sizes stands in for it")
            self.faults = [name for name in self.faults if name != "disk full"]

    def make_reference(self) -> None:
        """The uninterrupted run. ``story`` is what happened to the current one."""
        self.reference = self.directory = self.scratch / "reference" / "run"
        self.number, self.story = 0, ["the run without faults"]
        self._begin()
        self._must_end({"finished"})
        assert newest_step(self.directory) == STEPS, "the run without faults has not all its checkpoints"

    def run(self, number: int, until: float) -> None:
        """One run, from its first start to its end, and the resume of the finished run."""
        self.number, self.story, self.directory = number, [], self.place / f"run-{number}"
        last = random.Random(f"{self.seed}/{number}").randint(3, 8)
        starts, ended = [], False
        while not ended:
            self.draw = random.Random(f"{self.seed}/{number}/{len(starts)}")
            ended = self._attempt(faultless=len(starts) >= last or time.monotonic() > until)
            starts.append(self.start)
        files = digests(self.directory)
        self.story.append("resume of the finished run")
        self._begin()
        self._must_end({"finished"})
        assert digests(self.directory) == files, "the resume of a finished run changed it"
        left = starts[0].wait(15, everything=True)
        assert not left, f"the processes {left} are left, 15 s after the end"
        self.numbers["runs to the end"] += 1
        shutil.rmtree(self.directory)

    def tell(self, text: str) -> None:
        self.story[-1] += f", {text}"

    def one_of(self, what: str) -> int:
        """A process of the current start."""
        pids = self.start.processes()[what]
        if not pids:
            raise Missed
        pid = self.draw.choice(pids)
        self.tell(f"{1 + pids.index(pid)} of {len(pids)}")
        return pid

    def _begin(self) -> None:
        self.numbers["starts"] += 1
        command = self.workload.command(self.directory, "--resume", "latest")
        self.start = Start(command, self.workload.processes, self.scratch)

    def _must_end(self, allowed: set[str]) -> str:
        start = self.start
        ending = f"running after {LONGEST} s" if start.wait(LONGEST) else start.ending()
        expected = f"{ending} with exit code {start.code}, expected {' or '.join(sorted(allowed))}"
        assert ending in allowed, f"{start.logs} is {expected}; it said:\n{start.said().strip()[-3000:]}"
        self.tell(f"{ending} ({start.code})")
        return ending

    def _attempt(self, faultless: bool) -> bool:
        """Possibly damages the run, starts it, injects a fault, and checks the outcome. Returns whether it finished."""
        whole, kind = checkpoints(self.directory), None
        if self.damage and not faultless and newest_step(self.directory) and self.draw.random() < 0.6:
            kind = self.draw.choice(self.damage)
            shutil.rmtree(self.scratch / "backup", ignore_errors=True)
            shutil.copytree(self.directory, self.scratch / "backup", symlinks=True)
            self.story.append(f"damage: {DAMAGE[kind](self.directory, self.draw)}")
            self.struck[kind] += 1
        found, files, logged = checkpoints(self.directory), digests(self.directory), logged_steps(self.directory)
        newest = newest_step(self.directory)
        set_back = newest < max([0, *whole.values()])
        self._begin()
        try:
            allowed = self._strike(newest, faultless, after_damage=kind is not None)
            allowed |= {"refused"} if DAMAGE.get(kind) is unreadable or (set_back and not newest) else set()
            ending = self._must_end(allowed)
        finally:
            if self.place != self.scratch:
                self.disk.empty()
        resumed, again = self.start.resumed_at(), logged - newest
        if set_back and (resumed is not None or ending == "refused"):
            hidden = [path.name for path, step in whole.items() if step > found[path]]
            assert any(name in self.start.said() for name in hidden), f"it does not say what is wrong with {hidden}"
        changed = {self.directory / name for name, value in digests(self.directory).items() if files.get(name) != value}
        if resumed is not None:
            assert resumed == newest, f"it went on from step {resumed}, the newest good checkpoint has {newest}"
            self.numbers["steps computed again"] += max(0, again)
            assert set_back or again <= self.workload.most_lost, f"{again} steps are lost"
        elif ending == "refused" and kind:
            assert not changed, f"a start that refused has changed {changed}"
            shutil.rmtree(self.directory)
            shutil.copytree(self.scratch / "backup", self.directory, symlinks=True)
            return False
        after, saved = checkpoints(self.directory), newest_step(self.directory)
        broken = [path for path, step in after.items() if step < 0 and changed & {path, *path.glob("*")}]
        assert not broken and saved >= newest, f"the start damaged {broken}; step {newest} was saved, now {saved} is"
        late = ending == "stopped" and resumed is not None and saved != logged_steps(self.directory)
        assert not late, f"it stopped after step {logged_steps(self.directory)}, the newest checkpoint is of {saved}"
        damaged = {path for path, step in after.items() if step < 0}
        wrong = differences(self.directory, self.reference, ending == "finished", damaged)
        assert not wrong, f"differ from the run without faults: {', '.join(wrong)}"
        return ending == "finished"

    def _strike(self, newest: int, faultless: bool, after_damage: bool) -> set[str]:
        """Injects a fault. Returns the endings that are correct then."""
        name = "no fault" if faultless or not self.faults else self.draw.choice(self.faults)
        self.story.append(f"start: {name}")
        if name == "no fault":
            return {"finished"}
        try:
            self._reach(newest, FAULTS[name].in_startup and not after_damage and self.draw.random() < 0.3)
            allowed = FAULTS[name].strike(self)
        except Missed:
            self.tell("which struck nothing")
            return {"finished"}
        self.struck[name] += 1
        return allowed

    def _reach(self, newest: int, in_startup: bool) -> None:
        """Waits for a moment: in start-up, after a step, while a checkpoint is written, or in the last seconds."""
        step = self.draw.choice([newest + self.draw.randint(1, 20)] * 3 + [STEPS])
        wait = self.draw.uniform(0, 0.02 if step < STEPS else 1.5)
        if in_startup:
            wait = self.draw.uniform(0, STARTUP_SECONDS[self.workload.processes])
        else:
            self._until(
                lambda: logged_steps(self.directory) >= min(step, STEPS) and self.start.resumed_at() is not None
            )
            if self.draw.random() < 0.4:
                self._until(lambda: any((self.directory / "checkpoints").glob("*.tmp")))
        time.sleep(wait)
        self.tell(f"{wait:.3f} s after {'the start' if in_startup else f'step {logged_steps(self.directory)}'}")

    def _until(self, reached: Callable[[], bool]) -> None:
        """Raises Missed if the run ends before."""
        until = time.monotonic() + LONGEST
        while not reached():
            if self.start.code is not None:
                raise Missed
            assert time.monotonic() < until, f"{self.start.logs} makes no progress"
            time.sleep(0.001)
