"""Runs under faults: each is started repeatedly until it ends, and compared with the uninterrupted run."""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path

import checks
from checks import Checkpoints, logged_steps
from faults import DAMAGE, FAULTS, MOMENTS, Damage, Missed, SmallDisk, fill_disk, unreadable
from starts import Start
from workload import Workload

IDLE, DIVERGING = "resume of a finished run", "learning rate far too large"
FORKED = 0.8
"""Share of one-process starts that are forks of this process; the others are new processes."""
STARTUP_SECONDS = {"fork": 1.0, "new": 6.0}
"""About how long a process takes to begin training."""
_WRITE_SECONDS = 0.02


class Campaign:
    """The faults of one seed on a number of processes, in a directory of its own.

    An AssertionError of a method says that something was lost or wrong, or that a message was bad.
    """

    def __init__(self, options: argparse.Namespace, processes: int) -> None:
        """
        Args:
            options: those of ``inject.py``.
        """
        self.wanted = lambda name: options.faults is None or any(word in name for word in options.faults)
        self.seed, self.attempts = options.seed, options.attempts
        self.scratch = Path(tempfile.mkdtemp(prefix="clipup-faults-", dir=options.directory))
        self.workload = Workload(self.scratch, processes, options.parallel, options.checkpoint, options.epochs)
        self.workload.make()
        self.faults = [fault for fault in FAULTS if processes in fault.processes and self.wanted(fault.name)]
        self.damage = [each for each in DAMAGE if self.wanted(each.name)]
        self.struck: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()
        """The rows of the figures below the faults."""
        self._starts: list[Start] = []
        try:
            self.disk = SmallDisk(self.scratch / "disk")
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"SKIPPED: disk full ({error}); the limit on file sizes stands in for it")
            self.disk = None

    def make_reference(self) -> None:
        """The uninterrupted run. ``story`` is what happened to the current one."""
        self.reference = self.directory = self.scratch / "reference" / "run"
        self.number, self.story = 0, ["the run without faults"]
        self._must_end(self.begin(), {"finished"})
        assert self._sound().step == self.workload.steps, "the run without faults has not all its checkpoints"

    def run(self, number: int, until: float) -> None:
        """One run, from its first start to its end."""
        self.number, self.story = number, []
        draw = random.Random(f"{self.seed}/{number}")
        self.directory = (self.disk.path if self.disk else self.scratch / "runs") / f"run-{number}"
        attempts = self.attempts or draw.randint(3, 8)
        for attempt in itertools.count():
            self.draw = random.Random(f"{self.seed}/{number}/{attempt}")
            if self._attempt(attempt >= attempts or time.monotonic() > until):
                break
        if self.wanted(IDLE) and draw.random() < 0.4:
            before = checks.contents(self.directory)
            self._beside(IDLE, {"finished"}, "--resume", "latest")
            assert checks.contents(self.directory) == before, "the resume of a finished run changed it"
        self._end_run()
        self.numbers["runs to the end"] += 1
        if self.wanted(DIVERGING) and draw.random() < 0.2:
            self.directory = self.scratch / "runs" / "diverging"
            options = ("--lr", draw.choice(["30", "1e4", "1e30"]), "--warmup", "1", "--save-every-n-steps", "1")
            self._beside(DIVERGING, {"refused", "finished"}, *options)
            self._sound()
            self._end_run()

    def clear(self) -> None:
        """Ends remaining processes, and keeps what a failed run wrote on the disk."""
        for start in self._starts:
            start.clear(seconds=0)
        if self.disk is not None:
            if self.numbers["failures"] and self.directory.exists():
                shutil.copytree(self.directory, self.scratch / "failed", symlinks=True)
            self.disk.unmount()

    def begin(self, *options: str, fork: bool = False) -> Start:
        """Starts ``clipup`` on the current run."""
        self.numbers["starts"] += 1
        arguments = self.workload.command(self.directory.parent, self.directory.name, *options)
        start = Start(arguments, self.workload.processes, self.scratch / "starts", fork)
        self._starts.append(start)
        return start

    def tell(self, text: str) -> None:
        self.story[-1] += f", {text}"

    def one_of(self, pids: list[int], what: str) -> int:
        if not pids:
            raise Missed
        pid = self.draw.choice(pids)
        self.tell(f"{what} {1 + pids.index(pid)} of {len(pids)}")
        return pid

    def _sound(self, known: Container[str] = ()) -> Checkpoints:
        """The checkpoints of the run, none of which is damaged, but those whose digests are known, or not finite."""
        found = Checkpoints.of(self.directory)
        broken = [path.name for path, seen in found.damaged.items() if seen not in known]
        assert not (broken or found.not_finite), f"{broken} cannot be read, {found.not_finite} are not finite"
        return found

    def _end_run(self) -> None:
        for start in self._starts:
            left = start.clear(seconds=15)
            assert not left, f"of {start.describe()} the processes {left} are left, 15 s after its end"
        self._starts.clear()
        shutil.rmtree(self.directory)

    def _must_end(self, start: Start, allowed: set[str]) -> str:
        ending = start.ending() if start.wait(self.workload.longest) else f"running after {self.workload.longest:g} s"
        assert ending in allowed, (
            f"{start.describe()} is {ending} with exit code {start.code}, expected {' or '.join(sorted(allowed))}; "
            f"it said:\n{start.said().strip()[-3000:]}"
        )
        self.story[-1] += f" -> {ending}{f' ({start.code})' if start.code else ''}"
        return ending

    def _beside(self, kind: str, allowed: set[str], *options: str) -> None:
        """A start with something else than a fault in training."""
        self.story.append(f"{kind}: {' '.join(options)}")
        self.struck[kind] += 1
        self._must_end(self.begin(*options, fork=self.workload.processes == 1), allowed)

    def _attempt(self, faultless: bool) -> bool:
        """Possibly damages the run, starts it, injects a fault, and checks the outcome. Returns whether it finished."""
        whole = Checkpoints.of(self.directory)
        damage = None if faultless or not whole.steps or self.draw.random() < 0.4 else self._damage()
        self.before, logged = Checkpoints.of(self.directory), logged_steps(self.directory)
        hidden = [path.name for path in self.before.damaged if path in whole.steps]
        set_back = self.before.step != whole.step
        fork = self.workload.processes == 1 and self.draw.random() < FORKED
        files = checks.contents(self.directory)
        self.start = self.begin("--resume", "latest", fork=fork)
        try:
            allowed = self._strike(damage is not None, faultless, STARTUP_SECONDS["fork" if fork else "new"])
            if damage is not None and (damage.strike is unreadable or self.before.step is None and hidden):
                allowed |= {"refused"}
            ending = self._must_end(self.start, allowed)
        finally:
            if self.disk:
                self.disk.empty()
        resumed, said = self.start.resumed_at(), self.start.said()
        if set_back and (resumed is not None or ending == "refused"):
            assert any(name in said for name in hidden), f"it does not say what is wrong with {', '.join(hidden)}"
        if resumed is not None:
            self._check_resumed(resumed, max(0, logged - resumed), set_back)
        elif ending == "refused" and damage is not None:
            after = checks.contents(self.directory)
            changed = [name for name, digest in files.items() if after.get(name) != digest]
            assert not changed, f"a start that refused has changed {', '.join(changed)}"
            shutil.rmtree(self.directory)
            shutil.copytree(self.scratch / "backup", self.directory, symlinks=True)
            return False
        self._check_files(ending, resumed)
        return ending == "finished"

    def _damage(self) -> Damage | None:
        if not self.damage:
            return None
        (damage,) = self.draw.choices(self.damage, [each.weight for each in self.damage])
        shutil.rmtree(self.scratch / "backup", ignore_errors=True)
        shutil.copytree(self.directory, self.scratch / "backup", symlinks=True)
        self.story.append(f"damage: {damage.strike(self.directory, self.draw)}")
        self.struck[damage.name] += 1
        return damage

    def _strike(self, damaged: bool, faultless: bool, startup_seconds: float) -> set[str]:
        """Injects a fault. Returns the endings that are correct then."""
        able = [fault for fault in self.faults if self.disk or fault.strike is not fill_disk]
        moments = set(MOMENTS[damaged:])
        if self.attempts:  # after a fault that does not end its start, or in the last seconds, the run would end
            able = [fault for fault in able if fault.ends]
            moments -= {MOMENTS[3]}
        able = [fault for fault in able if moments & set(fault.moments)]
        if faultless or not able:
            self.story.append("start without a fault")
            return {"finished"}
        (fault,) = self.draw.choices(able, [each.weight for each in able])
        self.story.append(f"start: {fault.name}")
        try:
            self._reach(self.draw.choice([each for each in fault.moments if each in moments]), startup_seconds)
            allowed = fault.strike(self)
        except Missed:
            self.tell("which came too late")
            return {"finished"}
        self.struck[fault.name] += 1
        return allowed

    def _reach(self, moment: str, startup_seconds: float) -> None:
        """Waits for a moment; raises Missed if the run ends before it."""
        began, steps, done = time.monotonic(), self.workload.steps, self.before.step or 0
        if moment == MOMENTS[0]:
            seconds = self.draw.uniform(0, startup_seconds)
            self._until(lambda: time.monotonic() >= began + seconds)
            return self.tell(f"{seconds:.2f} s after the start")
        last, within = moment == MOMENTS[3], max(20, 2 * steps // (self.attempts or steps))
        step = steps if last else min(done + self.draw.randint(1, within), steps)
        self._until(lambda: logged_steps(self.directory) >= step and self.start.resumed_at() is not None)
        if moment == MOMENTS[2]:
            self._until(lambda: any((self.directory / "checkpoints").glob("*.tmp")))
        delay = self.draw.uniform(0, 1.5 if last else _WRITE_SECONDS)
        time.sleep(delay)
        self.tell(f"{moment}, {1000 * delay:.0f} ms after step {logged_steps(self.directory)}")

    def _until(self, reached: Callable[[], bool]) -> None:
        until = time.monotonic() + self.workload.longest
        while not reached():
            if self.start.code is not None:
                raise Missed
            assert time.monotonic() < until, f"{self.start.describe()} makes no progress"
            time.sleep(0.001)

    def _check_resumed(self, step: int, again: int, damaged: bool) -> None:
        newest = self.before.step
        assert newest is not None or not self.before.damaged, f"no checkpoint can be read, it began at step {step}"
        assert step == (newest or 0), f"it went on from step {step}, the newest good checkpoint has {newest or 'none'}"
        self.numbers["starts from a checkpoint"] += bool(self.before.steps)
        self.numbers["steps computed again"] += again
        if not damaged:
            self.numbers["most of them after one fault"] = max(self.numbers["most of them after one fault"], again)
            most = self.workload.most_lost
            assert again <= most, f"{again} steps are lost, and at most {most} may be"

    def _check_files(self, ending: str, resumed: int | None) -> None:
        """After every start: no intact file became damaged, and the records so far are correct."""
        after, before, logged = (
            self._sound(self.before.damaged.values()),
            self.before.step,
            logged_steps(self.directory),
        )
        assert (after.step or 0) >= (before or 0), f"the newest checkpoint was of step {before}, it is of {after.step}"
        if ending == "stopped" and resumed is not None:
            assert after.step == logged, f"it stopped after step {logged}, the newest checkpoint is of {after.step}"
        finished = ending == "finished"
        if not finished:
            self.numbers["half-written files of killed writers"] += len([*self.directory.rglob("*.tmp")])
        if finished or resumed is not None:
            wrong = checks.differences(self.directory, self.reference, finished, set(after.damaged))
            assert not wrong, "; ".join(wrong)
