"""Trains a tiny sparse CLIP with ``clipup train`` under random faults, and checks that nothing is lost.

    python tests/fault_injection/inject.py --seconds 600 --processes 1 2 --seed 0

A run is trained to its end without faults. Then the same run is killed, stopped, frozen, damaged, started twice and
left without disk space at random moments, and resumed with ``--resume latest`` until it ends: every start continues or
refuses with one readable message, and losses, weights, optimizer and files at the end are bitwise those of the run
without faults. Faults are drawn from the seed. The first failure ends the program with exit code 1; it prints the seed,
the history of the run, and its directory, which is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with more threads cannot be forked
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, even if another clipup is installed

import torch  # noqa: E402
from campaign import Campaign  # noqa: E402
from workload import EPOCHS, ROOT  # noqa: E402

from clipup_kernels.machine import processor_name  # noqa: E402

NUMBERS = (
    *("failures", "starts", "runs to the end", "starts from a checkpoint", "steps computed again"),
    *("most of them after one fault", "half-written files of killed writers", "minutes"),
)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up, as Ctrl-C does
    campaigns: list[Campaign] = []
    for processes in options.processes:
        campaigns.append(campaign := Campaign(options, processes))
        print(f"{processes} processes, seed {options.seed}, {options.seconds:.0f} s, {campaign.scratch}", flush=True)
        try:
            _work(campaign, options)
        except AssertionError as lost:
            campaign.numbers["failures"] += 1
            again = f"--processes {processes} --seed {options.seed} --first-run {campaign.number} --runs 1"
            lines = [f"FAILED: {lost}", f"  what happened to run {campaign.number} of seed {options.seed}:"]
            lines += [
                *(f"    {line}" for line in campaign.story),
                f"  again: python {os.path.relpath(__file__)} {again}",
            ]
            print("\n".join(lines), f"  kept: {campaign.scratch}", sep="\n", file=sys.stderr, flush=True)
            return 1
        finally:
            campaign.clear()
        shutil.rmtree(campaign.scratch)
    print(as_markdown(campaigns))
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="how long faults are injected, each time (600)")
    add(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        choices=(1, 2),
        help="1, or 2 under torchrun with gloo; both (1)",
    )
    parallel = ("replicated", "fsdp", "ep", "fsdp-ep")
    add("--parallel", choices=parallel, default="replicated", help="how two processes divide the model (replicated)")
    add("--checkpoint", choices=("full", "sharded"), default="full", help="the kind of checkpoints (full)")
    add("--epochs", type=int, default=EPOCHS, help=f"of a run, of 12 steps each ({EPOCHS})")
    add("--attempts", type=int, help="starts with a fault in each run (3 to 8, drawn)")
    add("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the faults (drawn)")
    add("--first-run", type=int, default=0, help="begin with the faults of this run (0)")
    add("--runs", type=int, default=1_000_000, help="stop after so many runs")
    add("--faults", nargs="+", help="only the kinds whose names contain one of these words")
    add("--directory", type=Path, help="where to work; a temporary directory by default")
    return parser.parse_args(argv)


def _work(campaign: Campaign, options: argparse.Namespace) -> None:
    """Runs until the time is over, and prints what happens."""
    campaign.make_reference()
    began = time.monotonic()
    for number in range(options.first_run, options.first_run + options.runs):
        if time.monotonic() > began + options.seconds:
            break
        campaign.run(number, began + options.seconds)
        campaign.numbers["minutes"] = round((time.monotonic() - began) / 60)
        print("\n".join(f"run {number}: {line}" for line in campaign.story), flush=True)


def as_markdown(campaigns: list[Campaign]) -> str:
    """A table of faults by number of processes, and the circumstances."""
    kinds = sorted({kind for campaign in campaigns for kind in campaign.struck})
    rows = [[kind, *(str(campaign.struck[kind]) for campaign in campaigns)] for kind in kinds]
    rows.append(["**faults**", *(f"**{campaign.struck.total()}**" for campaign in campaigns)])
    rows += [[f"**{what}**", *(f"**{campaign.numbers[what]}**" for campaign in campaigns)] for what in NUMBERS]
    names = ["one process" if campaign.workload.processes == 1 else "two processes" for campaign in campaigns]
    table = [["fault", *names], ["---", *("---:" for _ in names)], *rows]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + (
        f"\n\nSeed {campaigns[0].seed}, commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores ({processor_name()})."
    )


if __name__ == "__main__":
    raise SystemExit(main())
