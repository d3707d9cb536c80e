"""The page of a study is that of its logs."""

import shutil
from pathlib import Path

from studies import cli
from studies.runner import page as study_page

ROOT = Path(__file__).parents[3]


def test_the_committed_page_is_the_one_of_the_committed_logs(tmp_path):
    for path in study_page.write(ROOT / "studies" / "icons", tmp_path / "study.md"):
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes(), f"{path.name}: run `make study`"


def test_a_study_that_has_begun_has_a_page_that_counts_the_runs_to_come(found, tmp_path, capsys):
    shutil.copy(ROOT / "studies" / "icons-w384" / study_page.TEMPLATE, tmp_path)
    (tmp_path / "sparse-a.yaml").touch()
    (tmp_path / "to-come.yaml").touch()

    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "docs" / "study.md")]) == 0

    names = {Path(name).name for name in capsys.readouterr().out.split()}
    assert names == {"study.md"} | {f"study_{name}.svg" for name in ("recall", "loss", "similarity")}
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "54.0 ± 2.8" in page and "@iconify/json 1.2.3" in page and "1 of 2 runs have no log yet" in page
