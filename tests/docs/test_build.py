"""The manual builds without a warning."""

import subprocess
import sys

import pytest
from documents import ROOT


@pytest.mark.slow
def test_the_manual_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    run = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "html" / "transformers.html").is_file()
