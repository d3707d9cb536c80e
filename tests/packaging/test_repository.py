"""Files for contributors and for those who cite: they parse, and run the same checks as make."""

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
    for shown in (paper["title"], paper["identifiers"][0]["value"]):
        assert shown in (ROOT / "README.md").read_text("utf-8")


def test_every_platform_runs_the_gate_and_gets_wheels_from_jobs_that_may_only_read():
    job = CI["jobs"]["run"]
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-latest"]
    assert WHEELS["jobs"]["wheels"]["strategy"] == job["strategy"]
    assert [(ROOT / step["run"]).is_file() for step in job["steps"] if "run" in step] == [True]
    assert CI["permissions"] == WHEELS["permissions"] == {"contents": "read"}
