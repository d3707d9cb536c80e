"""Files for contributors and for those who cite: they parse, and run the same checks as make."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CI, WHEELS = (
    yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8")) for name in ("ci.yml", "wheels.yml")
)


def test_citation_names_the_licence_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    (paper,) = citation["references"]
    assert citation["license"] == re.search(r'^license = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert paper["title"] in readme and paper["identifiers"][0]["value"] in readme


def test_pre_commit_runs_the_programs_of_make_lint_from_the_same_environment():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
        assert hook["entry"].removeprefix(".venv/bin/").split()[0] in lint


def test_every_platform_runs_the_gate_and_gets_wheels_from_jobs_that_may_only_read():
    (job,) = CI["jobs"].values()
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-latest"]
    assert WHEELS["jobs"]["wheels"]["strategy"] == job["strategy"]
    assert [(ROOT / step["run"]).is_file() for step in job["steps"] if "run" in step] == [True]
    assert CI["permissions"] == WHEELS["permissions"] == {"contents": "read"}
