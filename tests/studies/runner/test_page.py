"""The page of a study is that of its logs."""

import csv
import dataclasses
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest

from studies import cli
from studies.runner import figures
from studies.runner import page as study_page
from studies.runner.tables import Tables

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("study, page", [("icons", "study"), ("memory", "where_experts_pay")])
def test_the_committed_page_and_tables_are_those_of_the_committed_logs(tmp_path, study, page):
    paths = study_page.write(ROOT / "studies" / study, tmp_path / f"{page}.md")
    written = {path.relative_to(tmp_path) for path in paths}
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / "docs" / path).read_bytes(), f"{path}: run `make study`"
    committed = [*ROOT.glob(f"docs/{page}/*"), *ROOT.glob(f"docs/{page}[._]*")]
    assert {path.relative_to(ROOT / "docs") for path in committed} == written


TEMPLATE = """{{ tables.data().source.package }}: {{ pending() | length }} runs have no log yet.
{{ saved("retrieval.csv", "model", {"m": tables.retrieval()}) }}
{{ saved("leads.csv", "model", {"m": tables.leads("clip_up")}) }}
{{ figure("models", {"sparse": [tables.shortest("clip_up")]}, "title") }}
"""


def test_a_study_that_has_begun_has_a_page_that_counts_the_runs_to_come(small_study, tmp_path, capsys):
    (tmp_path / study_page.TEMPLATE).write_text(TEMPLATE)
    arms = "arms: {a: {model: m, steps: 5, lr: 0.1}}"
    (tmp_path / "study.yaml").write_text(f"{arms}\nruns: [{{arm: a, name: sparse-a}}, {{arm: a, name: to-come}}]\n")

    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "docs" / "study.md")]) == 0

    names = {Path(name).name for name in capsys.readouterr().out.split()}
    assert names == {"study.md", "study_models.svg", "retrieval.csv", "leads.csv"}
    page = (tmp_path / "docs" / "study.md").read_text()
    assert page.startswith("@iconify/json: 1 runs have no log yet.\n[`retrieval.csv`](study/retrieval.csv)")
    with (tmp_path / "docs" / "study" / "retrieval.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if (row["split"], row["arm"]) == ("test_styles", "clip up"))
    assert row["text_to_image_R@1 %"] == "54.0 ± 2.8" and row["seeds"] == "2"


def test_a_figure_of_models_has_round_ticks_and_the_value_at_each_point(small_study):
    runs = Tables(small_study).shortest("clip_up")
    flops = [0.00062, 0.0043]
    points = [[dataclasses.replace(run, cost=run.cost | {"gflops_per_pair": x}) for run in runs] for x in flops]
    drawn = figures.models({"dense": points, "CLIP-UP": points[1:]}, "t", above=["CLIP-UP"])
    words = ["".join(text.itertext()).strip() for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert [word for word in words if word in ("0.5", "1", "2", "4", "0.62", "4.3")] == ["0.5", "1", "2", "4"]
    value = f"{100 * fmean(run.mean('R@1') for run in runs):.1f}"
    assert words.count(value) == 3
