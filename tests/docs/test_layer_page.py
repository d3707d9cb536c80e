"""The page about the layer runs as it stands."""

import subprocess
import sys

import pytest
from documents import ROOT, blocks


@pytest.mark.slow
def test_the_page_runs_as_it_stands():
    program = "\n".join(block.text for block in blocks(ROOT / "docs" / "layer.md", "python"))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
