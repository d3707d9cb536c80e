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
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with more threads cannot be forked
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, even if another clipup is installed

import figures  # noqa: E402
from campaign import DIVERGING, IDLE, Campaign, Lost, Tally  # noqa: E402
from damage import DAMAGE  # noqa: E402
from disks import SmallDisk, reason_against_mounting  # noqa: E402
from faults import FAULTS  # noqa: E402
from workload import EPOCHS, Workload  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if not Path("/proc/self/stat").exists():
        print("SKIPPED: fault injection finds processes in /proc, which this system lacks")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up, as Ctrl-C does
    tallies: dict[int, Tally] = {}
    for processes in options.processes:
        with _campaign(options, processes) as campaign:
            print(
                f"{processes} processes, seed {options.seed}, {options.seconds:.0f} s, {campaign.scratch}", flush=True
            )
            _work(campaign, options)
        tallies[processes] = campaign.tally
        print(figures.endings(campaign.tally), flush=True)
        if campaign.tally.failures and not options.keep_going:
            return 1
    print(figures.as_markdown(tallies, figures.circumstances(options.seed)))
    if options.report:
        figures.write(options.report, tallies, options.seed)
    return int(any(tally.failures for tally in tallies.values()))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long faults are injected, each time (600)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        choices=(1, 2),
        help="1, or 2 under torchrun with gloo; both (1)",
    )
    parser.add_argument(
        "--parallel",
        choices=("replicated", "fsdp", "ep", "fsdp-ep"),
        default="replicated",
        help="how two processes divide the model (replicated)",
    )
    parser.add_argument(
        "--checkpoint", choices=("full", "sharded"), default="full", help="the kind of checkpoints (full)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of a run, of 12 steps each ({EPOCHS})")
    parser.add_argument("--attempts", type=int, help="starts with a fault in each run (3 to 8, drawn)")
    parser.add_argument("--story", type=Path, help="append what happened to each run that ended")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the faults (drawn)")
    parser.add_argument("--first-run", type=int, default=0, help="begin with the faults of this run (0)")
    parser.add_argument("--runs", type=int, default=1_000_000, help="stop after so many runs")
    parser.add_argument("--faults", nargs="+", help="only the kinds whose names contain one of these words")
    parser.add_argument("--keep-going", action="store_true", help="count failures and continue with the next run")
    parser.add_argument("--report", type=Path, help="write the figures: .md between marks of that page, .json")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    return parser.parse_args(argv)


@contextmanager
def _campaign(options: argparse.Namespace, processes: int) -> Iterator[Campaign]:
    """A campaign in its own directory, which is removed at the end unless something failed."""

    def wanted(name: str) -> bool:
        return options.faults is None or any(word in name for word in options.faults)

    faults = [fault for fault in FAULTS if processes in fault.processes and wanted(fault.name)]
    damage = [each for each in DAMAGE if wanted(each.name)]
    besides = [name for name in (IDLE, DIVERGING) if wanted(name)]
    scratch = Path(tempfile.mkdtemp(prefix="clipup-faults-", dir=options.directory))
    workload = Workload(scratch, processes, options.parallel, options.checkpoint, options.epochs)
    workload.make()
    disk = None
    reason = reason_against_mounting(scratch / "probe")
    if reason is None:
        disk = SmallDisk(scratch / "disk")
        disk.mount()
    else:
        print(f"SKIPPED: disk full ({reason}); the limit on file sizes stands in for it")
    campaign = Campaign(workload, options.seed, scratch, disk, faults, damage, besides, options.attempts)
    try:
        yield campaign
    finally:
        campaign.clear()
        if disk is not None:
            disk.unmount()
        if not campaign.tally.failures:
            shutil.rmtree(scratch)


def _work(campaign: Campaign, options: argparse.Namespace) -> None:
    """Runs until the time is over or a check fails; failures are in the tally."""
    number, began = options.first_run, time.monotonic()
    try:
        campaign.make_reference()
        began = time.monotonic()
        while time.monotonic() < began + options.seconds and number < options.first_run + options.runs:
            try:
                campaign.run(number, began + options.seconds)
                if options.story:
                    with open(options.story, "a") as file:
                        file.writelines(f"run {number}: {line}\n" for line in campaign.story)
            except Lost as lost:
                _failed(campaign, options, number, lost)
                if not options.keep_going:
                    return
            number += 1
    except Lost as lost:
        _failed(campaign, options, number, lost)
    finally:
        campaign.tally.seconds = time.monotonic() - began


def _failed(campaign: Campaign, options: argparse.Namespace, number: int, lost: Lost) -> None:
    for kind in campaign.kinds or ["no fault"]:
        campaign.tally.failures[kind] += 1
    kept = campaign.keep(number)
    again = f"--processes {campaign.workload.processes} --seed {options.seed} --first-run {number} --runs 1"
    lines = [f"FAILED: {lost}", f"  what happened to run {number} of seed {options.seed}:"]
    lines += [f"    {line}" for line in campaign.story]
    lines += [f"  again: python {os.path.relpath(__file__)} {again}", f"  kept: {kept}; {campaign.scratch / 'starts'}"]
    print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
