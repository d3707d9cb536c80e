"""README: short, its example runs, its commands are commands, and its pictures are small charts."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from documents import ROOT, blocks, commands_of

from clipup import cli

README = ROOT / "README.md"


def test_readme_is_at_most_eighty_lines():
    assert len(README.read_text("utf-8").splitlines()) <= 80


def test_readme_example_runs_as_it_stands(tmp_path):
    (example,) = blocks(README, "python")
    run = subprocess.run([sys.executable, "-c", example.text], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_readme_shows_five_commands():
    shown = [words[0] for words in commands_of(README, "clipup")]
    assert len(shown) == len(set(shown)) == 5 and set(shown) <= set(cli.COMMANDS)


def test_readme_says_that_the_gpu_path_has_not_run_on_a_gpu_before_its_first_picture():
    assert "not run on a GPU yet" in README.read_text("utf-8").partition("![")[0]


def test_pictures_of_the_readme_are_small_charts_without_embedded_images():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text("utf-8"))
    assert pictures
    for picture in pictures:
        content = (ROOT / picture).read_bytes()
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(content).iter()}
        assert len(content) < 100 * 1024 and not tags & {"image", "script", "foreignObject"}, picture
