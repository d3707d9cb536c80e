"""Timing that holds on a noisy machine: candidates run in turn with a baseline, and ratios are taken pair by pair."""

from __future__ import annotations

import argparse
import csv
import functools
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from clipup_kernels.machine import package_version, processor_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types by their names in options and files."""


class Timing(NamedTuple):
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    """Median of the candidate's time over the baseline's, the two run in turn."""

    def columns(self, digits: int = 1) -> dict[str, str]:
        """The times of a row."""
        return {name: f"{getattr(self, name):.{digits}f}" for name in ("median_ms", "p20_ms", "p80_ms")}


Options = dict[str, dict[str, Any]]
"""What a program asks for: arguments of ``add_argument`` by flag."""
CSV: Options = {"--csv": {"help": "file to write the rows to"}}
ON_GPU: Options = CSV | {"--dtype": {"choices": ("bf16", "fp16"), "default": "bf16"}}
"""Of the programs about Triton's kernels."""


def number(default: float, text: str) -> dict[str, Any]:
    """An option that is a number."""
    return {"type": type(default), "default": default, "help": f"{text} (default: {default:g})"}


def timed(threads: int, rounds: int, seconds: float) -> Options:
    """The options of the programs that time on a CPU or a GPU, with these defaults."""
    return {
        "--threads": number(threads, "CPU threads"),
        "--device": {"choices": ("cpu", "cuda"), "default": "cpu", "help": "(default: cpu)"},
        "--rounds": number(rounds, "least number of alternating rounds"),
        "--seconds": number(float(seconds), "timing budget of each case"),
    }


def parser(description: str | None, options: Options) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, about in options.items():
        made.add_argument(flag, **about)
    return made


def run(
    argv: list[str] | None,
    description: str | None,
    options: Options,
    measure: Callable[[argparse.Namespace], Iterable[dict]],
    columns: str,
    note: str = "",
    device: str = "cpu",
) -> int:
    """A program that prints the named columns of what it measures, and writes all rows so far after every row.

    Without options for them, it runs on ``device`` and with torch's threads.
    """
    usual = {"device": device, "threads": torch.get_num_threads()}
    args = argparse.Namespace(**usual | vars(parser(description, CSV | options).parse_args(argv)))
    require_device(args.device)
    torch.set_num_threads(args.threads)
    print(f"{processor_name(args.device)}, commit {commit() or 'unknown'}; {note}\n")
    rows: list[dict] = []
    for row in measure(args):
        rows.append(row)
        if args.csv:
            write_csv(args.csv, rows)
    if not rows:
        raise SystemExit("nothing was timed")
    print_table(rows, columns.split())
    return 0


def on_device(args: argparse.Namespace, dtype: str) -> dict[str, object]:
    """The first columns of a row."""
    threads = args.threads if args.device == "cpu" else ""
    return {"device": processor_name(args.device), "dtype": dtype, "threads": threads}


def built_from() -> dict[str, object]:
    """The last columns of a row."""
    return {"commit": commit(), "torch": torch.__version__, "triton": package_version("triton")}


class GpuTable:
    """The rows of a program about Triton's kernels on a GPU, written again after every launch."""

    def __init__(self, args: argparse.Namespace, layer: str) -> None:
        require_device("cuda")
        self.about = {"machine": processor_name("cuda"), "layer": layer, "dtype": args.dtype} | built_from()
        print(*self.about.values(), sep=", ", flush=True)
        self.csv, self.failures = args.csv, 0
        self.rows: list[dict] = []

    def measure(self, launch: str, run: Callable[[], list[dict]]) -> list[dict]:
        """Adds and returns the rows of a launch; one that fails is named for the log and the summary, and counted."""
        try:
            fresh = [{"launch": launch, **row, **self.about} for row in run()]
        except Exception as failure:  # a compiler's or a driver's, of many kinds
            traceback.print_exception(failure)
            print(f"left out: {launch}: {one_line(failure)}", flush=True)
            self.failures += 1
            return []
        self.rows += fresh
        if self.csv:
            write_csv(self.csv, self.rows)
        return fresh


def one_line(failure: Exception) -> str:
    """The type of an exception, and the first line of its message."""
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def require_device(device: str) -> None:
    """Stops the program unless ``device`` is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA GPU here; use --device cpu")


Mark = float | torch.cuda.Event
"""A time: of the host in seconds, or on the GPU."""


def mark(device: str) -> Mark:
    """The time now. On a GPU an event in its queue, for which the host does not wait."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds of one call.

    On a GPU between two events, behind a sweep that empties the second-level cache. The sweep also gives the host a
    start of some tenths of a millisecond, as the layers in front do in a model: a call shows its launches only where
    it waits for the device.
    """
    if device != "cpu":
        _sweep(device).zero_()
    begin = mark(device)
    run()
    return between(begin, mark(device))


@functools.cache
def _sweep(device: str) -> torch.Tensor:
    """512 MiB, several times the second-level cache of any GPU."""
    with torch.inference_mode(False):  # the next pass may train
        return torch.empty(1 << 29, dtype=torch.uint8, device=device)


def peak_megabytes(run: Callable[[], object]) -> float:
    """Peak memory of a call on the current GPU in MB (10^6 bytes), without what was allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def alternate(
    candidates: dict[str, Callable[[], object]],
    baseline: str,
    seconds: float,
    device: str = "cpu",
    min_rounds: int = 5,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Times every candidate against ``candidates[baseline]``.

    A round runs, for each candidate, the baseline and then the candidate. Rounds go on for ``seconds`` of wall time,
    and for ``min_rounds`` at least. Two untimed rounds come first: they allocate the memory that is kept between calls.
    Calls of a few milliseconds by different engines need ``rest``, seconds before each pair: threads of the candidate
    before spin for tens of milliseconds while they wait for work, and take a core from the baseline.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for run in [*candidates.values()] * 2:
        clock(run, device)
    start = time.perf_counter()
    while len(times[baseline]) < min_rounds or time.perf_counter() - start < seconds:
        for name, run in candidates.items():
            time.sleep(rest)
            base = clock(candidates[baseline], device)
            taken = clock(run, device)
            times[name].append(taken)
            ratios[name].append(taken / base)
    return {name: timing(values, 1.0 if name == baseline else median(ratios[name])) for name, values in times.items()}


def timing(seconds: list[float], ratio: float = 1.0) -> Timing:
    """Median and fifths of the times of repeated calls."""
    fifths = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return Timing(median(seconds) * 1e3, fifths[0] * 1e3, fifths[-1] * 1e3, ratio)


@functools.cache
def commit() -> str:
    """The commit of the first call, with ``+`` when the tree differs from it; empty without git or a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """Writes the rows whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def print_table(rows: list[dict], columns: list[str]) -> None:
    """Prints the columns of the rows, numbers to the right."""
    cells = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    numeric = [all(line[i].replace(".", "").replace("-", "").isdigit() for line in cells) for i in range(len(columns))]
    for line in [columns, *cells]:
        padded = (t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, numeric, strict=True))
        print("  ".join(padded).rstrip(), flush=True)
