"""Files for contributors and for those who cite: they parse, and run the same checks as make."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CI, WHEELS = (
    yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8")) for name in ("ci.yml", "wheels.yml")
)


def test_every_platform_runs_the_gate_and_gets_wheels_from_jobs_that_may_only_read():
    assert WHEELS["jobs"]["wheels"]["strategy"] == CI["jobs"]["run"]["strategy"]
    assert [(ROOT / step["run"]).is_file() for step in CI["jobs"]["run"]["steps"] if "run" in step] == [True]
    assert CI["permissions"] == WHEELS["permissions"] == {"contents": "read"}
