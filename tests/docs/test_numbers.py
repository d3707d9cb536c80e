"""The numbers of README and docs are those of the committed CSV files and of the study's page."""

import re
import runpy
from types import SimpleNamespace

import pytest
from documents import ROOT, name

tables = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "tables.py")))
README, INDEX, FAQ, TRAINING = (
    ROOT / page for page in ("README.md", "docs/index.md", "docs/faq.md", "docs/training.md")
)


@pytest.mark.parametrize("page", tables.PAGES, ids=name)
def test_tables_of_measurements_are_what_their_program_writes(page):
    assert page.read_text("utf-8") == tables.filled(page), "run `python docs/tables.py`"


def test_every_table_of_measurements_is_on_a_page():
    pages = "".join(page.read_text("utf-8") for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table: (\w+) -->", pages)) == sorted(tables.TABLES)


def test_numbers_in_sentences_are_those_of_the_csv_files_and_of_the_study():
    text = {page: " ".join(page.read_text("utf-8").split()) for page in (README, INDEX, FAQ, TRAINING)}
    models = tables.measured("clip_throughput_cpu.csv")
    gflops = {f"{float(row['gflops_per_pair']):.1f}" for row in models}
    parameters = {row[column] for row in models for column in ("params_m", "active_params_m")}
    studies = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("study.md", "where_experts_pay.md"))
    for page in (README, INDEX, FAQ):
        assert set(re.findall(r"(\d+\.\d) GFLOP", text[page])) <= gflops, page
        assert set(re.findall(r"(?<![\d.])(\d+) M (?:parameters|active)", text[page])) <= parameters, page
        leads = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", text[page])
        assert len(leads) == {README: 4, INDEX: 6, FAQ: 0}[page] and all(lead in studies for lead in leads), page

    names = ("ViT-B-16", "ViT-B-16 CLIP-UP", "ViT-L-14")
    dense, sparse, large = (tables.measured("clip_throughput_xeon.csv", model=model)[0] for model in names)
    costs = [float(row["gflops_per_pair"]) for row in (dense, sparse, large)]
    batches = tables.batches([["1"], ["4"], ["16"]], "clip_throughput_batches_xeon.csv")
    saved = sorted(round(100 * (1 - float(image))) for _, image, *_ in batches)
    amx = tables.batches([["1"], ["4"], ["16"]], "clip_throughput_batches_amx.csv")
    one, four, sixteen = (round(100 * (float(image) - 1)) for _, image, *_ in amx)
    peers = [tables.measured("clip_throughput_engines_xeon.csv", model=f"ViT-B-16{form}")[0] for form in (" int8", "")]
    faster = [float(peers[0][column]) / float(peers[1][column]) for column in ("images_per_s", "texts_per_s")]
    overheads = tables.measured("trainer_overhead_cpu.csv")
    waits, costs_more = ([100 * float(row[column]) for row in overheads] for column in ("data_share", "overhead"))
    for page, phrase in (
        (README, f"{faster[0]:.1f} times as many images and {faster[1]:.1f} times as many captions"),
        (README, f"{100 * costs[1] / costs[2]:.0f} % of its FLOPs"),
        (README, f"dense B/16 in PyTorch ({dense['pairs_per_s']} per second)"),
        (README, f"takes {saved[0]} to {saved[-1]} % less time"),
        (README, f"{-sixteen} % less for 16 images, but {four} % more for 4 and {one} % more for one"),
        (TRAINING, f"at most {max(waits):.1f} % of a step"),
        (TRAINING, f"the rest {min(costs_more):+.1f} % to {max(costs_more):+.1f} % more than"),
    ):
        assert phrase in text[page], phrase
