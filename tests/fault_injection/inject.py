"""Trains a tiny sparse CLIP with ``clipup train`` under random faults, and checks that nothing is lost.

    python tests/fault_injection/inject.py --seconds 600 --processes 1 2 --seed 0

A run is trained to its end without faults. Then the same run is killed, stopped, frozen, damaged, started twice and
left without disk space at random moments, and resumed with ``--resume latest`` until it ends: every start continues or
refuses with one readable message, and losses, weights, optimizer and files at the end are bitwise those of the run
without faults. Faults are drawn from the seed. The first failure ends the program with exit code 1; it prints the seed,
the history of the run, and its directory, which is kept.
"""

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with more threads cannot be forked
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, even if another clipup is installed

import psutil  # noqa: E402
from campaign import Campaign  # noqa: E402

PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="how long faults are injected, each time (600)")
    add("--processes", type=int, nargs="+", default=[1], choices=(1, 2), help="1, or 2 under torchrun; both (1)")
    add("--sharded", action="store_true", help="2 processes divide the model, and write sharded checkpoints")
    add("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the faults (drawn)")
    add("--first-run", type=int, default=0, help="begin with the faults of this run (0)")
    add("--runs", type=int, default=1_000_000, help="stop after so many runs")
    add("--faults", nargs="+", default=[""], help="only the kinds whose names contain one of these words")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up, as Ctrl-C does
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, which finds them
    for processes in options.processes:
        campaign = Campaign(options, processes)
        print(f"{processes} processes, seed {options.seed}, {options.seconds:.0f} s, {campaign.scratch}", flush=True)
        try:
            _work(campaign, options)
        except AssertionError as lost:
            again = [f"--processes {processes}", *["--sharded"] * options.sharded, f"--seed {options.seed}"]
            again += [f"--first-run {campaign.number} --runs 1 --faults", *map(repr, options.faults)]
            story = "".join(f"    {line}\n" for line in campaign.story)
            print(f"FAILED: {lost}\n  run {campaign.number}:\n{story}  again: {' '.join(again)}", file=sys.stderr)
            shutil.copytree(campaign.directory, campaign.scratch / "failed", symlinks=True)
            print(f"  kept: {campaign.scratch}", file=sys.stderr, flush=True)
            return 1
        finally:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            subprocess.run(["umount", "--lazy", campaign.place], capture_output=True)
        shutil.rmtree(campaign.scratch)
    return 0


def _work(campaign: Campaign, options: argparse.Namespace) -> None:
    """Runs until the time is over, and prints what happens and how often."""
    campaign.make_reference()
    until = time.monotonic() + options.seconds
    for number in range(options.first_run, options.first_run + options.runs):
        if time.monotonic() > until:
            break
        campaign.run(number, until)
        print("\n".join(f"run {number}: {line}" for line in campaign.story), flush=True)
    for kind, count in [
        *sorted(campaign.struck.items()),
        ("faults", campaign.struck.total()),
        *campaign.numbers.items(),
    ]:
        print(f"{count:5} {kind}")


if __name__ == "__main__":
    raise SystemExit(main())
