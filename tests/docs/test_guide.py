"""The guide's commands run as they are, in order, in an empty directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_layouts import picture
from documents import ROOT, blocks

GUIDE = ROOT / "docs" / "guide.md"


@pytest.mark.slow
def test_guide_leads_from_a_dense_checkpoint_to_a_page_about_its_experts(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    for block in blocks(GUIDE, "bash"):
        subprocess.run(["bash", "-euxc", block.text], cwd=tmp_path, env=environment, check=True)
    for block in blocks(GUIDE, "python"):
        subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, env=environment, check=True)
    recall = json.loads((tmp_path / "clip_up.json").read_text())["retrieval"]
    assert recall["text_to_image_R@1"] > 3 * recall["chance_R@1"]
    assert "R@1" in (tmp_path / "logs" / "clip_up" / "model" / "README.md").read_text()
    assert "<svg" in (tmp_path / "experts.html").read_text()
    assert (tmp_path / "found.html").read_text().count("<figure>") == 2 * 3
