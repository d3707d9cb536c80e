"""The guide to transformers runs as it stands."""

import subprocess
import sys

import pytest
from documents import ROOT, blocks


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(tmp_path):
    program = "\n".join(block.text for block in blocks(ROOT / "docs" / "transformers.md", "python"))
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "sparse-clip" / "config.json").is_file()
