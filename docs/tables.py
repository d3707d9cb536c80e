"""Fills the tables of measurements in README.md and the manual from benchmarks/results: ``python docs/tables.py``.

A table below ``<!-- table: NAME -->`` has the rows of ``TABLES[NAME]``, which gets the rows of the page: some tables
take their labels from there. The head is the page's own.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from clipup.evaluate.retrieval import WAYS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "transformers.md")
Rows = Iterator[tuple[str, ...]]

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n\|.*\n\|.*\n)((?:\|.*\n)*)")


def filled(page: Path) -> str:
    """The text of a page with its tables filled."""

    def table(match: re.Match) -> str:
        head, name, body = match.groups()
        shown = [[cell.strip() for cell in line[1:-1].split("|")] for line in body.splitlines()]
        return head + "".join(f"| {' | '.join(row)} |\n" for row in TABLES[name](shown))

    return _TABLE.sub(table, page.read_text("utf-8"))


def measured(file: str, **wanted: str) -> list[dict[str, str]]:
    """The rows of a CSV file with these values."""
    with (ROOT / "benchmarks" / "results" / file).open(encoding="utf-8", newline="") as opened:
        return [row for row in csv.DictReader(opened) if all(row[key] == value for key, value in wanted.items())]


def ratio(value: str) -> str:
    return value and (f"{float(value):.2f}" if float(value) < 10 else f"{float(value):.1f}")


def ratio_of(column: str, file: str, **wanted: str) -> str:
    """The ratio in the only row of a file with these values; empty without one."""
    (row,) = measured(file, **wanted) or [{column: ""}]
    return ratio(row[column])


def costs_and_speeds(shown: list[list[str]]) -> Rows:
    condition = {"dtype": "fp32", "pass": "fwd", "batch_size": "16", "caption_words": "12", "threads": "2"}
    rows = {row["model"]: row for row in measured("clip_throughput_xeon.csv", **condition)}
    for label, *_ in shown:
        kind, size = label.split()
        name = f"ViT-{size.replace('/', '-')}{' CLIP-UP' if kind == 'CLIP-UP' else ''}"
        plain = rows[name]
        active = f" ({plain['active_params_m']} M)" if plain["active_params_m"] != plain["params_m"] else ""
        speeds = (ratio(rows[name + form]["speed_to_b16"]) for form in ("", " accelerated", " int8"))
        yield label, f"{plain['params_m']} M{active}", f"{float(plain['gflops_per_pair']):.1f}", *speeds


def layers(shown: list[list[str]], machine: str) -> Rows:
    for case, *_ in shown:
        tokens, width, hidden = re.fullmatch(r"([\d,]+) \(.*\), (\d+)/(\d+)", case).groups()
        layer = {"tokens": tokens.replace(",", ""), "d_model": width, "d_hidden": hidden, "experts": "8", "top_k": "2"}
        layer |= {"threads": "2", "routing": "balanced"}
        cells = []
        passes = (f"moe_forward_{machine}.csv", "clipup_prepared"), (f"moe_training_{machine}.csv", "clipup")
        for (file, impl), dtype in product(passes, ("fp32", "bf16")):
            times = (ratio_of("ratio_to_dense_k", file, dtype=dtype, impl=of, **layer) for of in (impl, "loop_unbind"))
            cells.append("{} ({})".format(*times).removesuffix(" ()"))
        yield case, *cells


def models(shown: list[list[str]]) -> Rows:
    passes = [measured("clip_throughput_cpu.csv", **{"pass": "fwd", "dtype": dtype}) for dtype in ("fp32", "bf16")]
    of_dtype = [{row["model"]: row for row in rows} for rows in passes]
    for model, row in sorted(of_dtype[0].items(), key=lambda item: float(item[1]["gflops_per_pair"])):
        speeds = (_speeds(rows[model], "pairs_per_s") for rows in of_dtype)
        yield model, f"{float(row['gflops_per_pair']):.1f}", *(cell for cells in speeds for cell in cells)


def training_steps(shown: list[list[str]]) -> Rows:
    for model, *_ in shown:
        (row,) = measured("clip_throughput_cpu.csv", model=model, **{"pass": "fwd_bwd"})
        yield model, *_speeds(row)


def by_implementation(shown: list[list[str]], file: str, first: str, impls: Sequence[str]) -> Rows:
    """Of layers whose label is the value of the column ``first`` and the type."""
    for label, *_ in shown:
        value, dtype = label.rsplit(", ", 1)
        layer = {first: value.replace(",", ""), "dtype": dtype}
        yield label, *(ratio_of("ratio_to_dense_k", file, impl=impl, **layer) for impl in impls)


def rates(shown: list[list[str]], file: str, columns: int) -> Rows:
    for row in measured(file):
        yield row["model"], *_speeds(row, "images_per_s", "texts_per_s", "pairs_per_s")[:columns]


def batches(shown: list[list[str]], file: str) -> Rows:
    """Times of forms of B/16 over those of OpenVINO's int8 on the dense model."""
    for batch, *_ in shown:
        rows = {row["model"]: row for row in measured(file, batch_size=batch)}
        peer = rows["ViT-B-16 openvino-int8"]
        ours = [rows[f"ViT-B-16 {form}"] for form in ("int8", "CLIP-UP int8")]
        rates = ("images_per_s", "texts_per_s")
        yield batch, *(f"{float(peer[rate]) / float(row[rate]):.2f}" for row in ours for rate in rates)


def accuracy(shown: list[list[str]]) -> Rows:
    forms = [("fp32", "0"), ("int8, bf16", "0"), ("int8, bf16", "1")]  # in float32 outliers change nothing
    for row in (row for row in measured("int8_accuracy_cpu.csv") if (row["form"], row["outliers"]) in forms):
        cosines = (f"{row[f'{tower}_cosine_mean']} ({row[f'{tower}_cosine_min']})" for tower in ("image", "text"))
        recalls = (f"{100 * float(row[f'{way}_R@1']):.2f}" for way in WAYS)
        outliers = "yes" if row["outliers"] == "1" else "no"
        yield row["model"].split("/")[0], outliers, row["form"], *cosines, *recalls


def text_encoder(shown: list[list[str]]) -> Rows:
    batches = (measured("int8_text_cpu.csv", batch_size=size) for size in ("1", "16"))
    for one, many in zip(*batches, strict=True):
        cosine = one["cosine_mean"] and f"{one['cosine_mean']} ({one['cosine_min']})"
        yield one["form"], one["spearman"], cosine, one["error"], ratio(one["ratio"]), ratio(many["ratio"])


def requests(shown: list[list[str]]) -> Rows:
    for image, caption in zip(*(measured("latency_cpu.csv", input=of) for of in ("image", "caption")), strict=True):
        times = [[f"{float(row[at]):.1f}" for at in ("p50_ms", "p99_ms")] for row in (image, caption)]
        yield image["model"], *times[0], ratio(image["ratio_to_first"]), *times[1], ratio(caption["ratio_to_first"])


def transformers(shown: list[list[str]]) -> Rows:
    file = "transformers_experts_cpu.csv"
    for experts, tokens, *_ in shown:
        wanted = {"model": experts.split(",")[0].lower(), "tokens": tokens}
        cases = [{"pass": kind, "impl": impl} | wanted for kind in ("fwd", "fwd_bwd") for impl in ("clipup", "eager")]
        yield experts, tokens, *(ratio_of("ratio_to_grouped_mm", file, **case) for case in cases)


def _speeds(row: dict[str, str], *rates: str) -> list[str]:
    return [*(row[rate] for rate in rates), ratio(row["speed_to_b16"]), ratio(row["speed_to_l14"])]


TABLES: dict[str, Callable[[list[list[str]]], Rows]] = {
    "costs_and_speeds": costs_and_speeds,
    "layers": partial(layers, machine="cpu"),
    "layers_amx": partial(layers, machine="amx"),
    "models": models,
    "training_steps": training_steps,
    "int8_layers": partial(
        by_implementation,
        file="moe_forward_int8_cpu.csv",
        first="tokens",
        impls=("clipup_prepared", "clipup_int8", "dense_k_int8", "dense_k_torch_int8"),
    ),
    "engines": partial(rates, file="clip_throughput_engines_xeon.csv", columns=4),
    "batches": partial(batches, file="clip_throughput_batches_xeon.csv"),
    "batches_amx": partial(batches, file="clip_throughput_batches_amx.csv"),
    "accuracy": accuracy,
    "text_encoder": text_encoder,
    "requests": requests,
    "few_rows": partial(
        by_implementation,
        file="moe_forward_few_rows_cpu.csv",
        first="experts",
        impls=("clipup", "clipup_prepared", "clipup_int8", "grouped_mm", "loop_unbind"),
    ),
    "transformers": transformers,
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page), "utf-8")
