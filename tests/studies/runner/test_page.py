"""The page of a study: it is the same for the same logs, and a template does nothing but write it."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from studies import cli
from studies.runner import log
from studies.runner import page as study_page

ROOT = Path(__file__).parents[3]
LAYERS = {"visual": {"similarity": 0.8, "load": 1.5, "dropped": 0.1}}


@pytest.mark.parametrize("study", ["icons", "icons-w384"])
def test_the_studies_own_templates_give_pages_and_figures_that_stay_the_same(study, found, tmp_path, capsys):
    directory, beside = tmp_path / study, tmp_path / "converged"
    directory.mkdir()
    for path in (ROOT / "studies" / study).iterdir():
        if path.name == study_page.TEMPLATE or path.suffix == ".csv":
            shutil.copy(path, directory)
    logs = found_logs(tmp_path)
    shutil.copytree(logs, beside / "logs")
    shutil.move(logs, directory / "logs")
    (beside / study_page.PART).write_text("The second part.")

    (directory / "sparse-a.yaml").touch()
    (directory / "to-come.yaml").touch()
    contents = []
    for _ in range(2):
        assert cli.main(["report", str(directory), "--out", str(tmp_path / "docs" / "study.md")]) == 0
        names = capsys.readouterr().out.split()
        contents.append({Path(name).name: Path(name).read_bytes() for name in names})

    assert contents[0] == contents[1]
    page = contents[0]["study.md"].decode()
    parts = ["", "converged_"] if study == "icons" else [""]
    figures = {f"study_{part}{name}.svg" for part in parts for name in ("recall", "loss", "similarity")}
    assert set(contents[0]) == {"study.md"} | figures and ("The second part." in page) == (study == "icons")
    assert "54.0 ± 2.8" in page and "@iconify/json 1.2.3" in page
    assert study != "icons" or ("1,000" in page and "11 duplicates and 12 near-duplicates" in page)
    assert "1 of 2 runs have no log yet" in page
    for name, content in contents[0].items():
        assert not name.endswith(".svg") or ElementTree.fromstring(content).tag.endswith("svg")


def test_a_study_without_template_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no page\.md\.j2 in"):
        study_page.write(tmp_path, tmp_path / "study.md")


def test_a_page_shows_a_study_beside_it_with_its_figures(found, tmp_path):
    first, second, logs = tmp_path / "first", tmp_path / "second", found_logs(tmp_path)
    for study in (first, second):
        shutil.copytree(logs, study / "logs")
    (first / study_page.TEMPLATE).write_text(
        "{% with tables = study('second') %}{% include 'second/part.md.j2' %}{% endwith %}"
    )
    (second / study_page.PART).write_text(
        "{{ tables.starts }} {{ by('name', 'step.csv', 'second').x.ratio }} {{ pending_of('second') | join }}"
    )
    for name in ("base", "not-run"):
        (second / f"{name}.yaml").write_text("")
    (second / "step.csv").write_text("name,ratio\nx,1.25\n")

    written = study_page.write(first, tmp_path / "page.md")

    assert (tmp_path / "page.md").read_text() == "[5] 1.25 not-run"
    figures = {"recall", "loss", "similarity"}
    assert {path.stem for path in written} == {"page"} | {
        f"page_{part}{name}" for part in ("", "second_") for name in figures
    }


def test_runs_that_stand_apart_have_tables_without_their_starts_and_no_figures(write, make_records, tmp_path):
    for arm, score in (("clip_up", 0.55), ("dense_equal_flops", 0.5)):
        layers = LAYERS if arm == "clip_up" else None
        write(make_records(arm, arm, score=score, lr=0.008, start="elsewhere", layers=layers))
    page, apart = tmp_path / "page", tmp_path / "apart"
    apart.mkdir()
    shutil.move(tmp_path / "logs", apart / "logs")
    log.write(page / "logs" / "a.jsonl", make_records("a", layers=LAYERS))
    (page / study_page.TEMPLATE).write_text("{{ study('apart').leads('clip_up') }}")

    written = study_page.write(page, tmp_path / "page.md")

    assert "| dense equal flops | 5 | 1 |" in (tmp_path / "page.md").read_text()
    assert {path.stem for path in written} == {"page", "page_recall", "page_loss", "page_similarity"}


def test_the_part_of_the_converged_study_says_what_its_logs_say(write, make_records, tmp_path):
    for start, gain in ((15000, 0.02), (30000, 0.01)):
        write(make_records(f"dense-{start}", "dense", steps=start))
        for arm, score in (("clip_up", 0.55), ("dense_continued", 0.5), ("dense_equal_flops", 0.5 + gain)):
            layers = LAYERS if arm == "clip_up" else None
            for seed in (0, 1, 2):
                name = f"{arm}-{start}-{seed}"
                write(make_records(name, arm, seed=seed, score=score, start=f"dense-{start}", layers=layers))
    page, converged = tmp_path / "page", tmp_path / "converged"
    log.write(page / "logs" / "a.jsonl", make_records("a", layers=LAYERS))
    converged.mkdir()
    shutil.move(tmp_path / "logs", converged / "logs")
    for name in (study_page.PART, "step.csv"):
        shutil.copy(ROOT / "studies" / "converged" / name, converged)
    for arm, score in (("clip_up", 0.6), ("dense_equal_flops", 0.5)):
        layers = LAYERS if arm == "clip_up" else None
        records = make_records(f"{arm}-higher", arm, lr=0.2, score=score, start="dense-30000", layers=layers)
        log.write(tmp_path / "converged_rate" / "logs" / f"{arm}.jsonl", records)
    include = "{% with tables = study('converged') %}{% include 'converged/part.md.j2' %}{% endwith %}"
    (page / study_page.TEMPLATE).write_text(include)

    written = study_page.write(page, tmp_path / "study.md")

    text = (tmp_path / "study.md").read_text()
    assert "on validation by **+0.75 ± 0.00** points" in text and "where the\nnumber is **+1.50 ± 0.00**, and" in text
    assert re.search(r"\| dense equal flops \| 5 \| 3 \|.*\| \*\*\+1\.80 ± 0\.00\*\* \|", text)
    assert "Drawings:\n" in text and "27.5" in text
    assert "| 0.2 | – | – | +4.50 | 1 |" in text and "| clip up | 5 | **0.2: 45.00** |" in text
    shown = set(re.findall(r"\((study_\w+\.svg)\)", text))
    assert shown == {path.name for path in written if path.name.startswith("study_converged")}


def found_logs(directory):
    (log,) = {path.parent for path in directory.rglob("*.jsonl*")}
    return log


def test_the_committed_page_is_the_one_of_the_committed_logs(tmp_path):
    for path in study_page.write(ROOT / "studies" / "icons", tmp_path / "study.md"):
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes(), f"{path.name}: run `make study`"
