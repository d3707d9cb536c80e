"""The figures of campaigns, as Markdown in a page of the manual and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from campaign import Tally
from workload import ROOT

from clipup_kernels.machine import processor_name

_BEGIN, _END = "<!-- figures -->", "<!-- end of figures -->"
_PROCESSES = {1: "one process", 2: "two processes"}


def write(path: Path, tallies: dict[int, Tally], seed: int) -> None:
    """Writes between two marks of a Markdown page, or a complete JSON file.

    Raises:
        ValueError: the page lacks the marks.
    """
    if path.suffix != ".md":
        path.write_text(json.dumps(_as_json(tallies, seed), indent=2) + "\n")
        return
    page = path.read_text()
    if page.count(_BEGIN) != 1 or page.count(_END) != 1:
        raise ValueError(f"{path} has no place for the figures: it needs the lines {_BEGIN} and {_END}")
    before, rest = page.split(_BEGIN)
    path.write_text(f"{before}{_BEGIN}\n{as_markdown(tallies, seed)}\n{_END}{rest.split(_END)[1]}")


def as_markdown(tallies: dict[int, Tally], seed: int) -> str:
    names = [_PROCESSES[processes] for processes in tallies]
    rows = [[kind, *(str(tally.faults[kind]) for tally in tallies.values())] for kind in _kinds(tallies)]
    rows += [
        [f"**{what}**", *(f"**{number(tally)}**" for tally in tallies.values())]
        for what, number in {
            "faults": lambda tally: tally.faults.total(),
            "failures": lambda tally: tally.failures.total(),
            "starts": lambda tally: tally.starts,
            "runs to the end": lambda tally: tally.runs,
            "starts from a checkpoint": lambda tally: tally.resumes,
            "steps computed again": lambda tally: tally.recomputed,
            "most of them after one fault": lambda tally: tally.most_recomputed,
            "half-written files of killed writers": lambda tally: tally.half_written,
            "minutes": lambda tally: f"{tally.seconds / 60:.1f}",
        }.items()
    ]
    table = [["fault", *names], ["---", *("---:" for _ in names)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + f"\n\n{_circumstances(seed)}"


def endings(tally: Tally) -> str:
    """How starts ended, by fault."""
    width = max(map(len, tally.endings), default=0)
    return "\n".join(
        f"  {kind:<{width}}  {', '.join(f'{ending} {count}' for ending, count in tally.endings[kind].most_common())}"
        f"{f', FAILED {tally.failures[kind]}' if tally.failures[kind] else ''}"
        for kind in sorted(tally.endings)
    )


def _kinds(tallies: dict[int, Tally]) -> list[str]:
    return sorted(set().union(*(+tally.faults for tally in tallies.values())))


def _circumstances(seed: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"Seed {seed}, commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores ({processor_name()})."
    )


def _as_json(tallies: dict[int, Tally], seed: int) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Counter | dict):
            return {key: plain(each) for key, each in sorted(value.items())}
        return round(value, 1) if isinstance(value, float) else value

    figures = {_PROCESSES[processes]: plain(vars(tally)) for processes, tally in tallies.items()}
    return {"circumstances": _circumstances(seed), **figures}
