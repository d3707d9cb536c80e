"""Runs under faults: each is started repeatedly until it ends, and compared with the uninterrupted run."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import checks
from checks import Checkpoints
from damage import Backup, Damage
from disks import SmallDisk
from faults import MOMENTS, Fault, Missed, Scene
from starts import Start
from workload import Workload

IDLE, DIVERGING = "resume of a finished run", "learning rate far too large"
FORKED = 0.8
"""Share of one-process starts that are forks of this process; the others are new processes."""
FORK_SECONDS = 1.0
"""About how long a fork takes to begin training."""


class Lost(Exception):
    """A check failed: something was lost or wrong, or a message was bad."""


@dataclass
class Tally:
    """Counts of the faults and their outcomes."""

    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    endings: dict[str, Counter[str]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    resumes: int = 0
    recomputed: int = 0
    most_recomputed: int = 0
    seconds: float = 0
    half_written: int = 0
    """Files left by killed writers that were found after a start."""


@dataclass
class Campaign:
    """The faults of one seed on a number of processes."""

    workload: Workload
    seed: int
    scratch: Path
    disk: SmallDisk | None
    faults: list[Fault]
    damage: list[Damage]
    besides: list[str]
    """Which of IDLE and DIVERGING are included."""
    attempts: int | None = None
    """Starts with a fault in each run; None draws them."""
    tally: Tally = field(default_factory=Tally)
    startup_seconds: float = 0
    story: list[str] = field(default_factory=list)
    """What happened to the current run."""
    kinds: list[str] = field(default_factory=list)
    """The faults of the current start."""
    directory: Path = Path()
    _starts: list[Start] = field(default_factory=list)
    """Those of the current run."""

    def make_reference(self) -> None:
        """The uninterrupted run."""
        self.reference = self.directory = self.scratch / "reference" / "run"
        start = self._begin()
        began = time.monotonic()
        while start.running and not checks.logged_steps(self.reference):
            time.sleep(0.01)
        self.startup_seconds = time.monotonic() - began
        if not start.wait(self.workload.longest) or start.ending() != "finished":
            raise Lost(f"the run without faults is {start.ending()}, see {start.logs}: {start.said()[-2000:]}")
        wrong = checks.finished_run_differs(self.reference, self.reference, set())
        if (
            wrong
            or Checkpoints.of(self.reference).not_finite
            or Checkpoints.of(self.reference).step != self.workload.steps
        ):
            raise Lost(f"the run without faults: {'; '.join(wrong) or 'its checkpoints'}")

    def run(self, number: int, until: float) -> None:
        """One run, from its first start to its end; raises Lost."""
        self.clear()
        self.story, self.kinds = [], []
        draw = random.Random(f"{self.seed}/{number}")
        disk = self.disk if self.disk is not None and draw.random() < 0.6 else None
        self.directory = (disk.path if disk else self.scratch / "runs") / f"run-{number}"
        self._excused: set[str] = set()
        attempts = self.attempts or draw.randint(3, 8)
        for attempt in itertools.count():
            faultless = attempt >= attempts or time.monotonic() > until
            if self._attempt(random.Random(f"{self.seed}/{number}/{attempt}"), disk, faultless):
                break
        if IDLE in self.besides and draw.random() < 0.4:
            self._idle_resume()
        self._check_no_process_is_left()
        self.tally.runs += 1
        shutil.rmtree(self.directory)
        if DIVERGING in self.besides and draw.random() < 0.2:
            self._diverge(draw)

    def keep(self, number: int) -> Path:
        """Moves the remaining files of a run to a permanent place; the disk they are on may be removed."""
        kept = self.scratch / "failed" / f"run-{number}"
        if self.directory.name and self.directory.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.move(self.directory, kept)
        return kept

    def clear(self) -> None:
        """Ends remaining processes."""
        for start in self._starts:
            start.clear(seconds=0)
        self._starts.clear()

    def _check_no_process_is_left(self) -> None:
        for start in self._starts:
            if left := start.clear(seconds=15):
                raise Lost(f"of {start.describe()} the processes {left} are left, 15 s after its end")
        self._starts.clear()

    def _begin(self, *options: str, fork: bool = False) -> Start:
        """Starts ``clipup`` on the current run."""
        self.tally.starts += 1
        arguments = self.workload.command(self.directory.parent, self.directory.name, *options)
        start = Start(arguments, self.workload.processes, self.scratch / "starts", self.directory, fork)
        self._starts.append(start)
        return start

    def _attempt(self, draw: random.Random, disk: SmallDisk | None, faultless: bool = False) -> bool:
        """Possibly damages the run, starts it, injects a fault, and checks the outcome. Returns whether it finished."""
        self.kinds = []
        before_damage = Checkpoints.of(self.directory)
        damage = None if faultless or draw.random() < 0.4 else self._damage(draw)
        before = Checkpoints.of(self.directory)
        contents = checks.contents(self.directory)
        logged = checks.logged_steps(self.directory)
        fork = self.workload.processes == 1 and draw.random() < FORKED
        start = self._begin("--resume", "latest", fork=fork)
        scene = Scene(
            start,
            self.directory,
            draw,
            disk,
            FORK_SECONDS if fork else self.startup_seconds,
            self._begin,
            before,
            self.workload.steps,
            self.workload.longest,
            max(20, 2 * self.workload.steps // (self.attempts or self.workload.steps)),
        )
        try:
            allowed = self._strike(scene, draw, damage is not None, faultless)
            if not start.wait(self.workload.longest):
                raise Lost(f"{start.describe()} did not end within {self.workload.longest:g} s")
        finally:
            if disk:
                disk.empty()
        if damage is not None and (before.step is None and before.damaged or damage.passing):
            allowed |= {"refused"}
        ending = start.ending()
        for kind in self.kinds:
            self.tally.endings.setdefault(kind, Counter())[ending] += 1
        self.story[-1] += f" -> {ending}{f' ({start.code})' if start.code else ''}"
        self._check(start, ending, allowed, before_damage, before, logged, contents, damage)
        return ending == "finished"

    def _damage(self, draw: random.Random) -> Damage | None:
        if not self.damage or not self.directory.is_dir():
            return None
        damage = draw.choices(self.damage, [each.weight for each in self.damage])[0]
        self.backup = Backup(self.directory, self.scratch / "backup")
        said = damage.strike(self.directory, draw)
        if said is None:
            return None
        self.story.append(f"damage: {said}")
        self.kinds.append(damage.name)
        self.tally.faults[damage.name] += 1
        return damage

    def _strike(self, scene: Scene, draw: random.Random, damaged: bool, faultless: bool) -> set[str]:
        """Injects a fault and returns the endings that are correct then."""
        able = [fault for fault in self.faults if fault.needs(scene)]
        moments = MOMENTS[1:] if damaged else MOMENTS
        if self.attempts:  # after a fault that does not end its start, or in the last seconds, the run would end
            able = [fault for fault in able if fault.ends]
            moments = [moment for moment in moments if moment != MOMENTS[3]]
        able = [fault for fault in able if set(fault.moments) & set(moments)]
        if faultless or not able:
            self.story.append("start without a fault")
            return {"finished"}
        fault = draw.choices(able, [each.weight for each in able])[0]
        try:
            scene.reach(draw.choice([moment for moment in fault.moments if moment in moments]))
            self.kinds.append(fault.name)
            self.tally.faults[fault.name] += 1
            allowed = fault.strike(scene)
        except Missed:
            self.tally.missed[fault.name] += 1
            self.story.append(f"start: {fault.name}, which came too late")
            if fault.name in self.kinds:
                self.kinds.remove(fault.name)
                self.tally.faults[fault.name] -= 1
            return {"finished"}
        except (AssertionError, TimeoutError) as error:
            self.story.append(f"start: {fault.name}, {', '.join(scene.story)}")
            raise Lost(str(error)) from error
        self.story.append(f"start: {fault.name}, {', '.join(scene.story)}")
        return allowed

    def _check(
        self,
        start: Start,
        ending: str,
        allowed: set[str],
        before_damage: Checkpoints,
        before: Checkpoints,
        logged: int,
        contents: dict[str, str],
        damage: Damage | None,
    ) -> None:
        if ending not in allowed:
            raise Lost(
                f"the start is {ending} with exit code {start.code}, expected {' or '.join(sorted(allowed))}; it "
                f"said:\n{start.said().strip()[-3000:]}"
            )
        news = start.said() + start.logged()
        resumed = start.resumed_at()
        hidden = [path.name for path in before.damaged if path in before_damage.steps]
        unreadable = before.step is None and bool(before.damaged)
        if unreadable and resumed is not None:
            raise Lost(f"no checkpoint can be read ({', '.join(hidden)}), and the run began at step {resumed}")
        if resumed is not None:
            self._resumed(resumed, before, logged, news, hidden, before_damage)
        if ending == "refused" and resumed is None and damage is not None:
            if not any(name in news for name in hidden):
                raise Lost(f"it refuses without naming any of {', '.join(hidden)}: {' '.join(start.messages())}")
            after = checks.contents(self.directory)
            if changed := [name for name in contents if after.get(name) != contents[name]]:
                raise Lost(f"a start that refused has changed {', '.join(changed)}")
            self.backup.restore()
            return
        self._check_files(ending, resumed, before)

    def _resumed(
        self, step: int, before: Checkpoints, logged: int, news: str, hidden: list[str], before_damage: Checkpoints
    ) -> None:
        if step != (before.step or 0):
            raise Lost(f"it went on from step {step}, the newest good checkpoint has {before.step or 'none'}")
        if before.steps:
            self.tally.resumes += 1
        recomputed = max(0, logged - step)
        self.tally.recomputed += recomputed
        if before.step == before_damage.step:
            self.tally.most_recomputed = max(self.tally.most_recomputed, recomputed)
            if recomputed > (most := self.workload.most_lost):
                raise Lost(f"{logged} steps were done, and the checkpoint has {step}: more than {most} are lost")
        elif not any(name in news for name in hidden):
            raise Lost(f"it took an older checkpoint without saying what is wrong with {', '.join(hidden)}")

    def _check_files(self, ending: str, resumed: int | None, before: Checkpoints) -> None:
        """Checks after every start: no intact file became damaged, and the records so far are correct."""
        after = Checkpoints.of(self.directory)
        broken = [path.name for path, seen in after.damaged.items() if before.damaged.get(path) != seen]
        if broken:
            raise Lost(f"{', '.join(broken)} cannot be read, and the harness did not damage it")
        if after.not_finite:
            raise Lost(f"{', '.join(path.name for path in after.not_finite)} holds values that are not finite")
        if (after.step or 0) < (before.step or 0):
            raise Lost(f"the newest checkpoint was of step {before.step}, it is of step {after.step} now")
        if ending == "stopped" and resumed is not None and after.step != checks.logged_steps(self.directory):
            logged = checks.logged_steps(self.directory)
            raise Lost(f"it stopped after step {logged}, and the newest checkpoint is of step {after.step}")
        self._excused |= {path.relative_to(self.directory).as_posix() for path in after.damaged}
        self._excused -= {path.relative_to(self.directory).as_posix() for path in after.steps}
        if ending == "finished":
            wrong = checks.finished_run_differs(self.directory, self.reference, self._excused)
        else:
            self.tally.half_written += sum(1 for _ in self.directory.rglob("*.tmp"))
            wrong = checks.records_differ(self.directory, self.reference, complete=False) if resumed is not None else []
        if wrong:
            raise Lost("; ".join(wrong))

    def _diverge(self, draw: random.Random) -> None:
        """Checks that a run with a far too large learning rate ends with a message and leaves finite checkpoints."""
        rate = draw.choice(["30", "1e4", "1e30"])
        self.directory = self.scratch / "runs" / "diverging"
        self.kinds = [DIVERGING]
        self.story = [f"a run of its own with --lr {rate} --warmup 1 --save-every-n-steps 1"]
        self.tally.faults[DIVERGING] += 1
        options = ("--lr", rate, "--warmup", "1", "--save-every-n-steps", "1")
        start = self._begin(*options, fork=self.workload.processes == 1)
        ended = start.wait(self.workload.longest)
        ending = start.ending() if ended else "running"
        self.tally.endings.setdefault(DIVERGING, Counter())[ending] += 1
        if ending not in ("refused", "finished"):
            raise Lost(f"a run with a learning rate of {rate} is {ending}: {start.said().strip()[-3000:]}")
        found = Checkpoints.of(self.directory)
        if found.damaged or found.not_finite:
            names = ", ".join(path.name for path in [*found.damaged, *found.not_finite])
            raise Lost(f"a run with a learning rate of {rate} left checkpoints that are not finite: {names}")
        self._check_no_process_is_left()
        shutil.rmtree(self.directory)

    def _idle_resume(self) -> None:
        """Checks that a finished run that is started again does not change."""
        self.kinds = [IDLE]
        self.tally.faults[IDLE] += 1
        self.story.append(IDLE)
        before = checks.contents(self.directory)
        start = self._begin("--resume", "latest", fork=self.workload.processes == 1)
        if not start.wait(self.workload.longest) or start.ending() != "finished":
            raise Lost(f"the resume of a finished run is {start.ending()}: {start.said().strip()[-3000:]}")
        self.tally.endings.setdefault(IDLE, Counter())["finished"] += 1
        after = checks.contents(self.directory)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            raise Lost(f"the resume of a finished run changed {', '.join(changed)}")
