"""The figures of campaigns, as Markdown in a page of the manual and as JSON.

As a program it puts those of a JSON file, and the story of its runs, into a section of a page:

    python tests/fault_injection/figures.py soak.json docs/fault_injection.md --section soak --story soak.txt
"""

from __future__ import annotations

import argparse
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

_PROCESSES = {1: "one process", 2: "two processes"}


def write(path: Path, tallies: dict[int, Tally], seed: int) -> None:
    """Writes between two marks of a Markdown page, or a complete JSON file.

    Raises:
        ValueError: the page lacks the marks.
    """
    if path.suffix == ".md":
        put(path, as_markdown(tallies, circumstances(seed)))
    else:
        path.write_text(json.dumps(_as_json(tallies, seed), indent=2) + "\n")


def put(page: Path, text: str, section: str = "") -> None:
    """Replaces what is between the marks of a section in a page.

    Raises:
        ValueError: the page lacks the marks.
    """
    name = f" of {section}" if section else ""
    begin, end = f"<!-- figures{name} -->", f"<!-- end of figures{name} -->"
    content = page.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{page} has no place for the figures: it needs the lines {begin} and {end}")
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def as_markdown(tallies: dict[int, Tally], circumstances: str) -> str:
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
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + f"\n\n{circumstances}"


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


def circumstances(seed: int) -> str:
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
    return {"circumstances": circumstances(seed), **figures}


def _from_json(path: Path) -> tuple[dict[int, Tally], str]:
    saved = json.loads(path.read_text())
    tallies = {}
    for processes, name in _PROCESSES.items():
        if name in saved:
            values = {key: Counter(value) if isinstance(value, dict) else value for key, value in saved[name].items()}
            tallies[processes] = Tally(**values)
    return tallies, saved["circumstances"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what inject.py --report wrote")
    parser.add_argument("page", type=Path)
    parser.add_argument("--section", default="", help="the name in the marks of the page")
    parser.add_argument("--story", type=Path, help="what inject.py --story wrote, to be shown below the table")
    options = parser.parse_args()
    text = as_markdown(*_from_json(options.figures))
    if options.story:
        text += f"\n\n```text\n{options.story.read_text().rstrip()}\n```"
    put(options.page, text, options.section)


if __name__ == "__main__":
    main()
