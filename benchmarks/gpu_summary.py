"""What ``gpu_suite.sh`` found: its steps, and pass or fail against every number that the GPU kernels have to show.

    python benchmarks/gpu_summary.py OUTDIR
    python benchmarks/gpu_summary.py OUTDIR --windows tests     # what was not to be measured is not missing

Reads ``steps.csv`` and the CSV files of the benchmarks in OUTDIR, writes ``summary.md`` there and prints its end, where
the verdict is. The exit status is 0 when every step ended well or was skipped for want of a tool, and every demand was
measured and met. Aims and peers that are faster are told and do not count.
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
PEERS = ("scattermoe", "megablocks", "sonicmoe", "hf_grouped_mm")
MOST_RATIO = {"fwd": 1.00, "fwd_bwd": 1.05}
LEAST_SPEED = {"cuBLAS loop": (LOOPS, 1.15), "grouped_mm": (("grouped_mm",), 1.3)}
AIM_TFLOPS = {"fwd": 600, "fwd_bwd": 500}
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
    """pass, FAIL or not measured; met or missed for an aim; told for what does not count."""


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def layer_rows(folder: Path) -> list[Row]:
    """The rows of moe_forward.py and moe_training.py, of all their files."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
    return [row for row in rows if row.get("ratio_to_dense_k")]


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in CASE)


def of_main_case(rows: Iterable[Row], pass_: str) -> dict[str, Row]:
    """The rows of the main case by implementation."""
    wanted = (*MAIN_CASE.values(), pass_)
    return {row["impl"]: row for row in rows if case_of(row) == wanted}


def speed(ours: Row, theirs: Row) -> float:
    """How many times as fast as another row ours is, both measured in turn with the same baseline."""
    return float(theirs["ratio_to_dense_k"]) / float(ours["ratio_to_dense_k"])


def judged(
    what: str, sign: str, bound: float, value: float | None, words: tuple[str, str] = ("pass", "FAIL")
) -> Finding:
    wanted = f"{sign} {bound:.4g}"
    if value is None:
        return Finding(what, wanted, "", "not measured")
    good = value <= bound if sign == "<=" else value >= bound
    return Finding(what, wanted, f"{value:.3g}", words[0] if good else words[1])


def demands(rows: list[Row]) -> Iterator[Finding]:
    """Every number that has to be shown, of bf16 at 50,000 tokens and 768/3072."""
    for pass_, most in MOST_RATIO.items():
        found = of_main_case(rows, pass_)
        ours = found.get("clipup")
        yield judged(f"{pass_}: ratio_to_dense_k", "<=", most, ours and float(ours["ratio_to_dense_k"]))
        for name, (impls, least) in LEAST_SPEED.items():
            speeds = [speed(ours, found[impl]) for impl in impls if ours and impl in found]
            yield judged(f"{pass_}: times as fast as {name}", ">=", least, min(speeds, default=None))
        tflops = ours and float(ours["tflops"])
        yield judged(f"{pass_}: TFLOP/s (aim)", ">=", AIM_TFLOPS[pass_], tflops, ("met", "missed"))
    yield saved_memory(rows)
    yield faster_peers(rows)


def saved_memory(rows: list[Row]) -> Finding:
    """The largest share of what may be saved: z and the routing, beside x and the parameters, which are arguments."""
    trained = [row for row in rows if row["impl"] == "clipup" and row["pass"] == "fwd_bwd"]
    shares = [float(row["saved_mb"]) / allowed_megabytes(row) for row in trained]
    return judged("saved over x + z + routing", "<=", SAVED_SLACK, max(shares, default=None))


def allowed_megabytes(row: Row) -> float:
    """z [R, H]; logits [T, E], gates, experts and both maps of R, offsets, and the router's weight in float32."""
    tokens, width, hidden, experts, top_k = (
        int(row[name]) for name in ("tokens", "d_model", "d_hidden", "experts", "top_k")
    )
    choices = tokens * top_k
    routing = 4 * (tokens * experts + 4 * choices + experts + 1 + experts * width)
    return (choices * hidden * ITEM_BYTES[row["dtype"]] + routing) / 1e6


def faster_peers(rows: list[Row]) -> Finding:
    """Which peers were faster in the same run, where and by how much."""
    ours = {case_of(row): row for row in rows if row["impl"] == "clipup"}
    pairs = [(ours[case_of(row)], row) for row in rows if row["impl"] in PEERS and case_of(row) in ours]
    if not pairs:
        return Finding("peers that are faster", "none", "", "no peer is installed")
    faster = [
        f"{theirs['impl']} {1 / speed(mine, theirs):.2f} times as fast ({' '.join(case_of(theirs))})"
        for mine, theirs in pairs
        if speed(mine, theirs) < 1
    ]
    return Finding("peers that are faster", "none", "; ".join(faster) or "none", "told" if faster else "pass")


def left_out(folder: Path) -> list[str]:
    """What the benchmarks say they left out, and why, each once."""
    lines = [line for log in sorted(folder.glob("*.log")) for line in log.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("left out: ")))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(heads), *map(list, rows)]
    cells = [" | ".join(text.replace("|", "/") for text in line) for line in lines]
    return [f"| {cells[0]} |", "|" + " --- |" * len(lines[0]), *(f"| {line} |" for line in cells[1:])]


def summary(folder: Path, measured: bool = True) -> tuple[str, bool]:
    """The page, and whether all is well.

    Args:
        measured: whether the main case was to be measured.
    """
    rows, steps = layer_rows(folder), read(folder / "steps.csv")
    found = list(demands(rows)) if measured else []
    well = all(step["status"] in WELL for step in steps) and not any(
        finding.verdict in ("FAIL", "not measured") for finding in found
    )
    where = (
        "{device}, torch {torch}, triton {triton}, commit {commit}".format(**rows[0])
        if rows
        else "no layer was measured"
    )
    shown = "dtype tokens d_model d_hidden pass impl median_ms tflops ratio_to_dense_k saved_mb peak_mb".split()
    page = ["# GPU suite", "", where, ""]
    page += [*table(shown, ([row[column] for column in shown] for row in rows)), ""]
    launched = "launch ms tflops gbytes_per_s predicted_ms measured_to_predicted".split()
    chosen = "layer launch choice ms p20_ms p80_ms ratio".split()
    whole = "model dtype pass batch_size pairs_per_s gflop_per_s speed_to_b16 speed_to_l14".split()
    staged = "stage tokens experts top_k how triton_us cuda_us ratio".split()
    files = {"kernels.csv": launched, "choices.csv": chosen, "routing_stages.csv": staged}
    files |= {"clip_inference.csv": whole, "clip_training.csv": whole}
    for name, columns in files.items():
        if (folder / name).is_file():
            page += [*table(columns, ([row[column] for column in columns] for row in read(folder / name))), ""]
    page += [line for told in left_out(folder) for line in (told, "")]
    page += [*table(("step", "status", "seconds", "last line"), (step.values() for step in steps)), ""]
    page += [*table(("it must show", "wanted", "measured", "verdict"), found), ""]
    page += ["all is well" if well else "not all is well"]
    return "\n".join(page) + "\n", well


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUTDIR", help="what gpu_suite.sh has written")
    parser.add_argument("--windows", nargs="+", default=["main"], help="windows that ran; main has the main case")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    if not (folder / "steps.csv").is_file():
        parser.error(f"{folder} has no steps.csv; benchmarks/gpu_suite.sh writes it")
    page, well = summary(folder, "main" in arguments.windows)
    (folder / "summary.md").write_text(page)
    print(page if len(page) <= PRINTED else f"(the beginning is in summary.md)\n{page[-PRINTED:]}", end="")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
