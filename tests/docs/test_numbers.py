"""The tables of README and docs hold the numbers of the committed CSV files and logs."""

import csv
import re
from pathlib import Path

import pytest
from documents import ROOT, name, tables

from clipup.evaluate.retrieval import WAYS
from studies.runner import results
from studies.runner.tables import Tables

README, PERFORMANCE, INDEX = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "index.md"
MODELS = "clip_throughput_cpu.csv"


def measured(name: str, **wanted: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def rows(page: Path, column: str) -> list[list[str]]:
    """The rows of the page's table with this column, without the head."""
    (found,) = (table for table in tables(page) if column in table[0])
    return found[1:]


def ratio(value: str) -> str:
    return f"{float(value):.2f}" if float(value) < 10 else f"{float(value):.1f}"


def test_costs_and_speeds_of_the_readme_are_those_of_the_csv_files():
    condition = {"dtype": "fp32", "pass": "fwd", "batch_size": "16", "caption_words": "12", "threads": "2"}
    found = {row["model"]: row for row in measured("clip_throughput_xeon.csv", **condition)}
    names = {"dense B/16": "ViT-B-16", "CLIP-UP B/16": "ViT-B-16 CLIP-UP", "dense L/14": "ViT-L-14"}
    shown = rows(README, "parameters (active)")
    assert [row[0] for row in shown] == list(names)
    for model, parameters, gflops, speeds in shown:
        plain, *others = (found.get(f"{names[model]}{form}") for form in ("", " accelerated", " int8"))
        active = f" ({plain['active_params_m']} M)" if plain["active_params_m"] != plain["params_m"] else ""
        assert [parameters, gflops] == [f"{plain['params_m']} M{active}", f"{float(plain['gflops_per_pair']):.1f}"]
        assert speeds == " / ".join(ratio(row["speed_to_b16"]) for row in (plain, *others)), model

    text = " ".join(README.read_text("utf-8").split())
    dense, sparse, large = (found[name] for name in names.values())
    costs = [float(row["gflops_per_pair"]) for row in (dense, sparse, large)]
    assert f"{float(sparse['params_m']) / float(dense['params_m']):.1f} times the parameters" in text
    assert f"{costs[1] / costs[0]:.1f} times the FLOPs" in text
    assert f"{100 * costs[1] / costs[2]:.0f} % of its FLOPs" in text
    assert f"plain dense B/16 ({dense['pairs_per_s']} per second)" in text


def test_what_the_trainer_costs_is_what_was_measured():
    page = " ".join((ROOT / "docs" / "training.md").read_text("utf-8").split())
    ((waits, least, most),) = re.findall(r"at most (\S+) % of a step, and the rest (\S+) % to (\S+) % more than", page)
    found = measured("trainer_overhead_cpu.csv")
    assert waits == f"{max(100 * float(row['data_share']) for row in found):.1f}"
    overheads = [100 * float(row["overhead"]) for row in found]
    assert [least, most] == [f"{min(overheads):+.1f}", f"{max(overheads):+.1f}"]


@pytest.mark.parametrize("page", [README, INDEX, ROOT / "docs" / "faq.md"], ids=name)
def test_costs_in_text_and_drawings_are_those_of_the_csv(page):
    known = {f"{float(row['gflops_per_pair']):.1f}" for row in measured(MODELS)}
    parameters = {row[column] for row in measured(MODELS) for column in ("params_m", "active_params_m")}
    text = page.read_text("utf-8")
    assert set(re.findall(r"(\d+\.\d) GFLOP", text)) <= known
    assert set(re.findall(r"(?<![\d.])(\d+) M (?:parameters|active)", text)) <= parameters


def test_layer_times_are_those_of_the_csv_files():
    columns = ("fp32 inference", "bf16 inference", "fp32 training", "bf16 training")
    for case, *cells in rows(PERFORMANCE, columns[0]):
        tokens, width, hidden = re.fullmatch(r"([\d,]+) \(.*\), (\d+)/(\d+)", case).groups()
        wanted = {"tokens": tokens.replace(",", ""), "d_model": width, "d_hidden": hidden}
        wanted |= {"threads": "2", "experts": "8", "top_k": "2", "routing": "balanced", "device": "AMD EPYC"}
        for cell, column in zip(cells, columns, strict=True):
            dtype, kind = column.split()
            name, impl = ("forward", "clipup_prepared") if kind == "inference" else ("training", "clipup")
            found = [measured(f"moe_{name}_cpu.csv", dtype=dtype, impl=one, **wanted) for one in (impl, "loop_unbind")]
            times = [[ratio(row["ratio_to_dense_k"]) for row in of_one] for of_one in found]
            assert [cell] == ([f"{ours} ({loop})" for ours, loop in zip(*times, strict=True)] or [""]), (case, column)


def test_times_of_whole_models_are_those_of_the_csv_file():
    models = {(row["model"], row["pass"], row["dtype"]): row for row in measured(MODELS)}
    shown = rows(PERFORMANCE, "GFLOP per pair")
    assert {row[0] for row in shown} == {model for model, kind, _ in models if kind == "fwd"}
    for model, gflops, *cells in shown:
        found = [models[model, "fwd", dtype] for dtype in ("fp32", "bf16")]
        assert gflops == f"{float(found[0]['gflops_per_pair']):.1f}"
        assert cells == [
            cell
            for row in found
            for cell in (row["pairs_per_s"], ratio(row["speed_to_b16"]), ratio(row["speed_to_l14"]))
        ]
    steps = [table for table in tables(PERFORMANCE) if table[0] == ["model", "x B/16", "x L/14"]]
    for model, *cells in steps[0][1:]:
        (row,) = measured(MODELS, model=model, **{"pass": "fwd_bwd"})
        assert cells == [ratio(row["speed_to_b16"]), ratio(row["speed_to_l14"])], model


PER_SECOND = ("images_per_s", "texts_per_s")


def of_batch(machine: str, batch: str, model: str, column: str) -> str:
    """The time of a form of B/16 over that of OpenVINO's int8 on the dense model."""
    models = (f"ViT-B-16 {model}", "ViT-B-16 openvino-int8")
    found = [measured(f"clip_throughput_batches_{machine}.csv", batch_size=batch, model=one) for one in models]
    ours, theirs = (float(row[column]) for (row,) in found)
    return f"{theirs / ours:.2f}"


def test_int8_times_and_accuracies_are_those_of_the_csv_files():
    impls = ("clipup_prepared", "clipup_int8", "dense_k_int8", "dense_k_torch_int8")
    for case, *cells in rows(PERFORMANCE, "sparse, int8"):
        tokens, dtype = case.rsplit(", ", 1)
        wanted = {"tokens": tokens.replace(",", ""), "dtype": dtype}
        found = [measured("moe_forward_int8_cpu.csv", impl=impl, **wanted) for impl in impls]
        assert cells == [ratio(row["ratio_to_dense_k"]) for (row,) in found], case
    models = measured("clip_throughput_int8_cpu.csv")
    assert rows(PERFORMANCE, "pairs/s") == [
        [
            *(row[column] for column in ("model", "images_per_s", "texts_per_s", "pairs_per_s")),
            *(ratio(row[column]) for column in ("speed_to_b16", "speed_to_l14")),
        ]
        for row in models
    ]
    assert rows(PERFORMANCE, "pairs per second") == [
        [
            *(row[column] for column in ("model", "images_per_s", "texts_per_s", "pairs_per_s")),
            ratio(row["speed_to_b16"]),
        ]
        for row in measured("clip_throughput_engines_xeon.csv")
    ]
    over_openvino, with_amx = (
        [
            [batch, *(of_batch(machine, batch, one, rate) for one in ("int8", "CLIP-UP int8") for rate in PER_SECOND)]
            for batch in ("1", "4", "16")
        ]
        for machine in ("xeon", "amx")
    )
    assert rows(PERFORMANCE, "image, dense int8") == over_openvino
    assert rows(PERFORMANCE, "batch, with AMX") == with_amx
    saved = sorted(round(100 * (1 - float(image))) for _, image, *_ in over_openvino)
    assert f"takes {saved[0]} to {saved[-1]} % less time" in README.read_text("utf-8")
    assert rows(PERFORMANCE, "text_to_image_R@1 %") == [
        [
            *(row["model"].split("/")[0], "yes" if row["outliers"] == "1" else "no", row["form"]),
            *(f"{row[f'{tower}_cosine_mean']} ({row[f'{tower}_cosine_min']})" for tower in ("image", "text")),
            *(f"{100 * float(row[f'{way}_R@1']):.2f}" for way in WAYS),
        ]
        for row in measured("int8_accuracy_cpu.csv")
    ]


def test_times_of_single_requests_are_those_of_the_csv_file():
    shown = rows(PERFORMANCE, "image p50")
    for place, what in ((1, "image"), (4, "caption")):
        assert [[row[0], *row[place : place + 3]] for row in shown] == [
            [row["model"], *(f"{float(row[one]):.1f}" for one in ("p50_ms", "p99_ms")), ratio(row["ratio_to_first"])]
            for row in measured("latency_cpu.csv", input=what)
        ]
    impls = ("clipup", "clipup_prepared", "clipup_int8", "grouped_mm", "loop_unbind")
    for case, *cells in rows(PERFORMANCE, "experts, type"):
        experts, dtype = case.split(", ")
        of_case = [measured("moe_forward_few_rows_cpu.csv", experts=experts, dtype=dtype, impl=impl) for impl in impls]
        assert cells == [ratio(row["ratio_to_dense_k"]) for (row,) in of_case], case


def test_times_of_transformers_experts_are_those_of_the_csv_file():
    found = measured("transformers_experts_cpu.csv")
    assert {row["impl"] for row in found} == {"grouped_mm", "eager", "clipup"}
    times = {
        (row["model"], row["tokens"], row["pass"], row["impl"]): ratio(row["ratio_to_grouped_mm"]) for row in found
    }
    for experts, tokens, *cells in rows(ROOT / "docs" / "transformers.md", "tokens"):
        case = experts.split(",")[0].lower(), tokens
        wanted = [times.pop((*case, kind, impl), "") for kind in ("fwd", "fwd_bwd") for impl in ("clipup", "eager")]
        assert cells == wanted, case
    assert {impl for *_, impl in times} == {"grouped_mm"}  # everything else is in the table


BASELINES = {"dense_continued": "steps", "dense_equal_flops": "FLOPs", "dense_equal_seconds": "CPU time"}
VERDICTS = {"better": "CLIP-UP is better", "worse": "the baseline is better", "not decided": "undecided"}


WIDE, NARROW = "30,000", "30,000 at width 32"


def study_tables() -> dict[str, Tables]:
    """The study's parts by the steps of their dense start."""
    found = {part: Tables(results.read(ROOT / "studies" / part / "logs")) for part in ("icons", "converged", "narrow")}
    return {"5,000": found["icons"], WIDE: found["converged"].of_start(30_000), NARROW: found["narrow"]}


def leads() -> list[list[str]]:
    """Steps of the dense start, baseline, steps, seeds, R@1 difference and verdict, out of the study's logs."""
    return [
        [start, f"the same {baseline}", budget, seeds, lead.strip("*"), VERDICTS.get(verdict, "one seed, undecided")]
        for start, of_start in study_tables().items()
        for baseline, budget, seeds, lead, verdict, *_ in of_start.comparisons("clip_up", BASELINES)
    ]


def test_the_verdict_on_the_first_page_is_that_of_the_studys_logs():
    known = {tuple(lead[:5]): lead[5] for lead in leads()}
    _, *bullets = INDEX.read_text("utf-8").split("\n- After ")
    assert len(bullets) == 3
    for bullet in bullets:
        found = re.match(r"(\S+) dense steps and (\S+) more( at width 32|), over (\d+) seeds", bullet)
        start, steps, width, seeds = found.groups()
        found = re.findall(r"([+-]\S+ ± \S+) at\s+equal\s+(\w+)(\s+\(undecided)?", bullet)
        assert [what for _, what, _ in found] == ["FLOPs", "steps"]
        for lead, what, undecided in found:
            assert (known[start + width, f"the same {what}", steps, seeds, lead] == "undecided") == bool(undecided)


def test_the_readme_quotes_the_studys_verdict():
    """That from the converged starts, at equal FLOPs and at equal steps, and against the larger dense model."""
    (paragraph,) = (part for part in README.read_text("utf-8").split("\n\n") if part.startswith("**Does it pay?**"))
    paragraph = " ".join(paragraph.split())
    found = {(start, what): rest for start, what, steps, *rest in leads() if steps == "5,000"}
    cells = [found[start, f"the same {what}"] for what in ("FLOPs", "steps") for start in (WIDE, NARROW)]
    tables = study_tables()
    larger = [tables[NARROW].lead("clip_up", arm, of=tables[WIDE]).strip("*") for arm in ("dense", "dense_continued")]
    quoted = re.findall(r"([+-]\d+\.\d+ ± \d+\.\d+)", paragraph)
    assert quoted == [lead for _, lead, _ in cells] + larger
    assert {seeds for seeds, *_ in cells} == {"8"} and "eight paired seeds" in paragraph
    assert [verdict for *_, verdict in cells] == ["CLIP-UP is better"] * 4  # the paragraph says so
