"""The pages of the manual: they run as they stand, their links lead somewhere, and the manual builds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_layouts import picture
from documents import PAGES, ROOT, blocks, broken_links, name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_existing_files_and_headings(page):
    assert broken_links(page) == []


@pytest.mark.parametrize(
    "page",
    ["README.md", *(pytest.param(f"docs/{page}.md", marks=pytest.mark.slow) for page in ("layer", "transformers"))],
)
def test_the_page_runs_as_it_stands(page, tmp_path):
    program = "\n".join(block.text for block in blocks(ROOT / page, "python"))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_guide_leads_from_a_dense_checkpoint_to_a_page_about_its_experts(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    for language, program in (("bash", ["bash", "-euxc"]), ("python", [sys.executable, "-c"])):
        for block in blocks(ROOT / "docs" / "guide.md", language):
            subprocess.run([*program, block.text], cwd=tmp_path, env=environment, check=True)
    recall = json.loads((tmp_path / "clip_up.json").read_text())["retrieval"]
    assert recall["text_to_image_R@1"] > 3 * recall["chance_R@1"]
    assert "R@1" in (tmp_path / "logs" / "clip_up" / "model" / "README.md").read_text()
    assert "<svg" in (tmp_path / "experts.html").read_text()
    assert (tmp_path / "found.html").read_text().count("<figure>") == 2 * 3


@pytest.mark.slow
def test_the_manual_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "html")], check=True)


def test_readme_is_at_most_eighty_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 80
