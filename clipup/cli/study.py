"""``clipup study``: runs of a study from their config files, and the page made of their logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..study import report, runner, runs
from ..train import TrainingInterrupted
from . import run_one_of
from .outputs import check_file

_DIVERGED, _INTERRUPTED = 1, 130


@dataclass
class Run:
    """Runs or resumes runs, the shortest first, each after the run that it starts from; what has a log is done.

    On one thread of the CPU, if --device says no other. A run that was stopped goes on where its last checkpoint is, on
    the CPU to the same bits.

    Example: clipup study run studies/icons/clip_up-2500-lr0.004-s0.yaml --data data/icons --runs runs/icons
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Config files, a run each."""
    data: Path
    """Directory of the data set (`clipup data icons`)."""
    runs: Path
    """Directory of checkpoints and models; may be thrown away once the logs are there."""
    logs: Path | None = None
    """Directory of the logs. None: `logs` beside the config."""
    device: str = "cpu"
    """Where to train and evaluate; `cuda` for models that a CPU's thread is too slow for."""

    def run(self) -> int:
        if not self.files:
            raise ValueError("files: name at least one config file of a run")
        files = sorted(self.files, key=lambda file: (runs.read(file).steps, file.name))
        for number, file in enumerate(files, 1):
            print(f"[{number}/{len(files)}] {file.stem}", flush=True)
            try:
                print(f"      {runner.run(file, self.data, self.runs, self.logs, self.device)}", flush=True)
            except FloatingPointError as error:
                print(f"clipup study: {file.stem}: {error}", flush=True)
                return _DIVERGED
            except TrainingInterrupted as stopped:
                print(f"clipup study: stopped, saved {stopped.checkpoint}; the same command goes on", flush=True)
                return _INTERRUPTED
        return 0


@dataclass
class Report:
    """Writes the page of a study and its figures, every number out of the logs.

    Example: clipup study report studies/icons --out docs/study.md
    """

    study: tyro.conf.Positional[Path]
    """Directory of the study: page.md.j2, and logs."""
    out: Path
    """The page; figures are written beside it."""

    def run(self) -> int:
        check_file("out", self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for path in report.write(self.study, self.out):
            print(path)
        return 0


COMMANDS = {"run": Run, "report": Report}


def main(argv: list[str]) -> int:
    return run_one_of(COMMANDS, "clipup study", "command", argv)
