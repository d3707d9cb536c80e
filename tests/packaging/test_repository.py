"""Files for contributors and for those who cite: they parse, and run the same checks as make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def test_citation_names_the_software_and_the_paper():
    citation = read(ROOT / "CITATION.cff")
    (paper,) = citation["references"]
    assert citation["cff-version"] == "1.2.0" and citation["title"].startswith("clipup") and citation["authors"]
    assert citation["license"] == re.search(r'^license = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert paper["title"] in readme and paper["identifiers"][0]["value"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_pre_commit_runs_the_programs_of_make_lint_from_the_same_environment():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]:
        program, *_ = hook["entry"].removeprefix(".venv/bin/").split()
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") and program in lint


def test_every_platform_runs_the_gate():
    jobs = read(WORKFLOWS / "ci.yml")["jobs"]
    (job,) = jobs.values()
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-latest"]
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert (ROOT / command).is_file()


@pytest.mark.parametrize("name", ["ci.yml", "wheels.yml"])
def test_workflows_are_short_and_may_only_read(name):
    workflow = read(WORKFLOWS / name)
    assert workflow["permissions"] == {"contents": "read"}
    assert len((WORKFLOWS / name).read_text().splitlines()) < 60


def test_wheels_are_built_for_every_platform_of_the_gate():
    of_wheels, of_gate = (read(WORKFLOWS / name)["jobs"] for name in ("wheels.yml", "ci.yml"))
    assert of_wheels["wheels"]["strategy"] == of_gate["run"]["strategy"]
