"""Trains a tiny sparse CLIP with ``clipup train`` under random faults, and finds out whether anything is lost.

    python tests/fault_injection/inject.py --seconds 600 --processes 1 --seed 0

A run is trained to its end without faults. Then the same run is killed, stopped, frozen, denied the disk, damaged and
started twice at random moments, and resumed with ``--resume latest`` until it ends: every start continues or refuses
with one readable message, and losses, weights, optimizer and files at the end are bitwise those of the run without
faults. Faults are drawn from the seed. The first failure ends the program with exit code 1, the seed, what was done to
the run, and its directory, which is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with more threads cannot be forked

from campaign import Campaign, Lost  # noqa: E402
from damage import DAMAGE  # noqa: E402
from disks import SmallDisk, reason_against_mounting  # noqa: E402
from faults import FAULTS  # noqa: E402
from report import as_json, as_table  # noqa: E402
from workload import Workload, has_rank_timeout  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if not Path("/proc/self/stat").exists():
        print("SKIPPED: fault injection finds processes in /proc, which this system lacks")
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="clipup-faults-", dir=options.directory))
    began = time.monotonic()
    with ExitStack() as stack:
        campaign = _campaign(options, scratch, stack)
        print(
            f"{options.processes} processes, seed {options.seed}, {options.seconds:.0f} s, below {scratch}", flush=True
        )
        failed = _work(campaign, options)
        print(as_table(campaign.tally, options, time.monotonic() - began))
        if options.report:
            options.report.write_text(as_json(campaign.tally, options, time.monotonic() - began))
    if not failed:
        shutil.rmtree(scratch)
    return int(failed)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long faults are injected (600)")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="1, or 2 under torchrun with gloo (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (0)")
    parser.add_argument("--first-run", type=int, default=0, help="begin with the faults of this run (0)")
    parser.add_argument("--runs", type=int, default=1_000_000, help="stop after so many runs")
    parser.add_argument(
        "--faults", nargs="*", help="only the kinds whose names contain one of these words; none without"
    )
    parser.add_argument("--keep-going", action="store_true", help="count failures and go on with the next run")
    parser.add_argument("--report", type=Path, help="write the figures into this file as JSON")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    return parser.parse_args(argv)


def _campaign(options: argparse.Namespace, scratch: Path, stack: ExitStack) -> Campaign:
    def wanted(name: str) -> bool:
        return options.faults is None or any(word in name for word in options.faults)

    faults = [fault for fault in FAULTS if options.processes in fault.processes and wanted(fault.name)]
    damage = [each for each in DAMAGE if wanted(each.name)]
    if options.processes > 1 and not has_rank_timeout():
        print("SKIPPED: a rank frozen for long (the trainer has no timeout option)")
        faults = [fault for fault in faults if fault.name != "a rank frozen for long"]
    reason = reason_against_mounting(scratch / "probe")
    disk = None
    if reason is None:
        disk = stack.enter_context(SmallDisk(scratch / "disk"))
    else:
        print(f"SKIPPED: disk full ({reason}); the limit on file sizes stands in for it")
    workload = Workload(scratch, options.processes)
    workload.make()
    return Campaign(workload, options.seed, scratch, disk, faults, damage)


def _work(campaign: Campaign, options: argparse.Namespace) -> bool:
    """Whether anything failed."""
    number = options.first_run
    try:
        campaign.make_reference()
        until = time.monotonic() + options.seconds
        while time.monotonic() < until and number < options.first_run + options.runs:
            try:
                campaign.run(number, until)
            except Lost as lost:
                for kind in campaign.kinds or ["none"]:
                    campaign.tally.failures[kind] += 1
                _print_failure(campaign, options, number, lost)
                if not options.keep_going:
                    return True
            number += 1
    except Lost as lost:
        _print_failure(campaign, options, number, lost)
        return True
    finally:
        campaign.clear()
    return campaign.tally.failures.total() > 0


def _print_failure(campaign: Campaign, options: argparse.Namespace, number: int, lost: Lost) -> None:
    kept = campaign.keep(number)
    print(f"FAILED: {lost}", file=sys.stderr)
    print(f"  what was done to the run, with --processes {options.processes} --seed {options.seed}:", file=sys.stderr)
    for line in campaign.story:
        print(f"    {line}", file=sys.stderr)
    again = f"--processes {options.processes} --seed {options.seed} --first-run {number} --runs 1"
    print(f"  again: python {os.path.relpath(__file__)} {again}", file=sys.stderr)
    print(f"  kept: {kept}, the starts in {campaign.scratch / 'starts'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
