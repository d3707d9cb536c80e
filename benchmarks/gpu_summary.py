"""The results of ``gpu_suite.sh``: its steps, and pass or fail against every number that the GPU kernels have to show.

    python benchmarks/gpu_summary.py OUTDIR
    python benchmarks/gpu_summary.py OUTDIR --windows tests     # what was not to be measured is not missing

Reads ``steps.csv`` and the CSV files of the benchmarks in OUTDIR, writes ``summary.md`` there and prints its end, where
the verdict is. The exit status is 0 when every step ended well or was skipped for want of a tool, and every demand was
measured and met. Peers that are faster are told and do not count, but the verdict needs the strong peers.
The last table applies the decisions that docs/gpu_kernels.md made before the measurements.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]
MAIN_CASE = {
    "dtype": "bf16", "tokens": "50000", "d_model": "768", "d_hidden": "3072", "experts": "8", "top_k": "2",
    "routing": "balanced",
}  # fmt: skip
CASE = (*MAIN_CASE, "pass")
"""The columns that say what was measured."""
LOOPS = ("loop", "loop_unbind", "loop_sorted")
STRONG_PEERS = ("grouped_mm_fused", "quack")
NO_PEERS = ("clipup", "dense")
"""Beginnings of the names of this project's layers and of dense MLPs."""
MOST_RATIO = {"fwd": 1.00, "fwd_bwd": 1.05}
LEVEL = 0.97
"""At most this share of another's time counts as faster."""
LEAST_SPEED = {"cuBLAS loop": (LOOPS, 1.15), "grouped_mm_fused": (("grouped_mm_fused",), 1 / LEVEL)}
QUACK_AHEAD = 1.15
QUACK_LAUNCHES = ("project_in, z kept", "project_back")
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SAVED_SLACK = 1.01
WELL = ("ok", "skipped")
PRINTED = 11_000
"""Characters of the page that are printed, of its end: some consoles keep little more."""


class Finding(NamedTuple):
    """A demand and what was measured."""

    what: str
    wanted: str
    measured: str
    verdict: str
    """pass, FAIL or not measured; told for what does not count."""


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_with(folder: Path, column: str) -> list[Row]:
    """The rows of all files that have a value in this column: ``ratio_to_dense_k`` of layers, ``gflop`` of launches."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path) if row.get(column)]


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in CASE)


def of_main_case(rows: Iterable[Row], pass_: str) -> dict[str, Row]:
    """The rows of the main case by implementation."""
    wanted = (*MAIN_CASE.values(), pass_)
    return {row["impl"]: row for row in rows if case_of(row) == wanted}


def speed(ours: Row, theirs: Row) -> float:
    """How many times as fast as another row ours is, both measured in turn with the same baseline."""
    return float(theirs["ratio_to_dense_k"]) / float(ours["ratio_to_dense_k"])


def judged(what: str, sign: str, bound: float, value: float | None) -> Finding:
    wanted = f"{sign} {bound:.4g}"
    if value is None:
        return Finding(what, wanted, "", "not measured")
    good = value <= bound if sign == "<=" else value >= bound
    return Finding(what, wanted, f"{value:.3g}", "pass" if good else "FAIL")


def demands(rows: list[Row]) -> Iterator[Finding]:
    """Every number that has to be shown, of bf16 at 50,000 tokens and 768/3072."""
    for pass_, most in MOST_RATIO.items():
        of_impl = of_main_case(rows, pass_)
        ours = of_impl.get("clipup")
        yield judged(f"{pass_}: ratio_to_dense_k", "<=", most, ours and float(ours["ratio_to_dense_k"]))
        for name, (impls, least) in LEAST_SPEED.items():
            speeds = [speed(ours, of_impl[impl]) for impl in impls if ours and impl in of_impl]
            yield judged(f"{pass_}: times as fast as {name}", ">=", least, min(speeds, default=None))
    off = [f"{row['impl']} by {row['off_by']} ({' '.join(case_of(row))})" for row in rows if row.get("off_by")]
    verdict = ("FAIL" if off else "pass") if rows else "not measured"
    yield Finding("results that are off", "none", "; ".join(off) or ("none" if rows else ""), verdict)
    yield saved_memory(rows)
    yield faster_peers(rows)


def saved_memory(rows: list[Row]) -> Finding:
    """The largest share of what may be saved: z and the routing, beside x and the parameters, which are arguments."""
    trained = [row for row in rows if row["impl"] == "clipup" and row["pass"] == "fwd_bwd"]
    shares = [float(row["saved_mb"]) / allowed_megabytes(row) for row in trained]
    return judged("saved over x + z + routing", "<=", SAVED_SLACK, max(shares, default=None))


def allowed_megabytes(row: Row) -> float:
    """z [R, H]; logits [T, E], gates, experts and both maps of R, offsets, and the router's weight in float32."""
    sizes = ("tokens", "d_model", "d_hidden", "experts", "top_k")
    tokens, width, hidden, experts, top_k = (int(row[name]) for name in sizes)
    routing = 4 * (tokens * (experts + 4 * top_k) + experts + 1 + experts * width)
    return (tokens * top_k * hidden * ITEM_BYTES[row["dtype"]] + routing) / 1e6


def faster_peers(rows: list[Row]) -> Finding:
    """Which peers were faster in the same run, where and by how much."""
    ours = {case_of(row): row for row in rows if row["impl"] == "clipup"}
    pairs = [(ours[case_of(row)], row) for row in rows if not row["impl"].startswith(NO_PEERS) and case_of(row) in ours]
    missing = [
        f"{impl} {pass_}" for pass_ in MOST_RATIO for impl in STRONG_PEERS if impl not in of_main_case(rows, pass_)
    ]
    if missing:
        return Finding("peers that are faster", "none", f"without {', '.join(missing)}", "not measured")
    faster = [
        f"{theirs['impl']} {1 / speed(mine, theirs):.2f} times as fast ({' '.join(case_of(theirs))})"
        for mine, theirs in pairs
        if speed(mine, theirs) < 1
    ]
    return Finding("peers that are faster", "none", "; ".join(faster) or "none", "told" if faster else "pass")


def decisions(rows: list[Row], launches: dict[str, float]) -> Iterator[tuple[str, str, str]]:
    """What was decided beforehand in docs/gpu_kernels.md: the question, the measured number and what follows."""
    ours, theirs = ([launches.get(of + name) for name in QUACK_LAUNCHES] for of in ("", "quack, "))
    quack = None if None in (*ours, *theirs) else sum(ours) / sum(theirs)
    training = of_main_case(rows, "fwd_bwd")
    pair = [training[impl] for impl in ("clipup", "grouped_mm_fused") if impl in training]
    grouped = 1 / speed(*pair) if len(pair) == 2 else None

    def row(what: str, value: float | None, bound: float, then: str, otherwise: str) -> tuple[str, str, str]:
        if value is None:
            return what, "", "not measured: undecided"
        return what, f"{value:.2f} times as fast", then if value >= bound else otherwise

    yield row(
        "QuACK, project_in and project_back together", quack, QUACK_AHEAD,
        "an optional backend for sm_90 and sm_100; tuning for Hopper ends", "no backend",
    )  # fmt: skip
    yield row(
        "grouped_mm_fused, both passes", grouped, LEVEL,
        "the default for training; the products of our own go", "our own products stay",
    )  # fmt: skip
    if quack is not None and grouped is not None and quack < QUACK_AHEAD and grouped < LEVEL:
        yield "neither", "", "one Gluon kernel for the two products, nothing else"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(heads), *map(list, rows)]
    cells = [" | ".join(text.replace("|", "/") for text in line) for line in lines]
    return [f"| {cells[0]} |", "|" + " --- |" * len(lines[0]), *(f"| {line} |" for line in cells[1:])]


def summary(folder: Path, measured: bool = True, unfinished: bool = False) -> tuple[str, bool]:
    """The page, and whether all is well.

    Args:
        measured: whether the main case was to be measured. unfinished: whether steps are still to come.
    """
    rows, steps = rows_with(folder, "ratio_to_dense_k"), read(folder / "steps.csv")
    findings = list(demands(rows)) if measured else []
    well = (
        not unfinished
        and all(step["status"] in WELL for step in steps)
        and not any(finding.verdict in ("FAIL", "not measured") for finding in findings)
    )
    where = "{device}, torch {torch}, triton {triton}, commit {commit}".format(**rows[0]) if rows else "no layer"
    page = ["# GPU suite", "", where, ""]
    for path in sorted(folder.glob("*.csv")):
        if path.name != "steps.csv" and (lines := read(path)):
            page += [f"{path.stem}:", "", *table(lines[0], (line.values() for line in lines)), ""]
    logs = [log.read_text(errors="replace") for log in sorted(folder.glob("*.log"))]
    told = [line for log in logs for line in log.splitlines() if line.startswith("left out: ")]
    page += [line for words in dict.fromkeys(told) for line in (words, "")]
    page += [*table(("step", "status", "seconds", "last line"), (step.values() for step in steps)), ""]
    page += [*table(("it must show", "wanted", "measured", "verdict"), findings), ""]
    if measured:
        launches = {row["launch"]: float(row["ms"]) for row in rows_with(folder, "gflop")}
        page += [*table(("decided beforehand", "measured", "what follows"), decisions(rows, launches)), ""]
    page += ["the run has not ended"] if unfinished else ["all is well" if well else "not all is well"]
    return "\n".join(page) + "\n", well


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUTDIR", help="what gpu_suite.sh has written")
    parser.add_argument("--windows", nargs="+", default=["main"], help="windows that ran; main has the main case")
    parser.add_argument("--unfinished", action="store_true", help="steps are still to come")
    args = parser.parse_args(argv)
    page, well = summary(args.folder, "main" in args.windows, args.unfinished)
    (args.folder / "summary.md").write_text(page)
    print(page if len(page) <= PRINTED else f"(the beginning is in summary.md)\n{page[-PRINTED:]}", end="")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
