"""The script for a machine with a GPU, run with stand-ins for its tools: its order, its patience and its records."""

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import moe_bench
import pytest

SUITE = Path(moe_bench.__file__).parent / "gpu_suite.sh"
TOOLS = "bash sh cat cut dirname env find grep gzip mkdir mktemp rm tail tar timeout tr".split()
PYTHON = """#!/bin/sh
case "$*" in
  *gpu_summary.py*) exec {python} "$@" ;;
  *moe_training.py*--dtype\\ bf16*) echo 'RuntimeError: "broken", badly'; exit 3 ;;
  *"import open_clip"* | *"import xdist"*) exit 1 ;;
  *) echo "first"; echo "ran $*" ;;
esac
"""


class Suite:
    """The suite with nothing on its PATH but the tools that it needs and a Python that only says what it was asked."""

    def __init__(self, folder):
        self.tools, self.out = folder / "tools", folder / "out"
        self.tools.mkdir()
        for tool in TOOLS:
            (self.tools / tool).symlink_to(shutil.which(tool))
        self.program("python3", PYTHON.format(python=sys.executable))

    def program(self, name, text):
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, *windows, **environment):
        """The finished process, and the rows of steps.csv by step."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        environment = inherited | {"PATH": str(self.tools)} | environment
        command = [shutil.which("bash"), str(SUITE), str(self.out), *windows]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        with (self.out / "steps.csv").open() as file:
            return result, {row["step"]: row for row in csv.DictReader(file)}

    def log(self, step):
        return (self.out / f"{step}.log").read_text()


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all windows: the suite, the finished process and the steps."""
    suite = Suite(tmp_path_factory.mktemp("suite"))
    suite.program("compute-sanitizer", '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING sanitizer $*"\n')
    return suite, *suite()


def test_a_step_that_fails_is_recorded_the_others_run_and_what_is_not_installed_is_skipped_by_name(whole):
    suite, result, steps = whole
    assert result.returncode == 1 and (suite.out / "summary.md").read_text() in result.stdout
    unwell = {name: row["status"] for name, row in steps.items() if row["status"] != "ok"}
    assert unwell == dict.fromkeys(("training", "training_sizes"), "failed") | dict.fromkeys(
        ("clip_inference", "clip_training"), "skipped"
    )
    assert steps["training"]["words"] == "RuntimeError: broken badly"
    assert steps["clip_training"]["words"] == "needs open_clip"


def test_what_matters_most_comes_first_with_options_of_the_programs(whole):
    suite, _, steps = whole
    order = ["device", "build", "smoke", "self_check", "kernels", "forward", "training", "choices"]
    assert list(steps)[: len(order)] == order
    for step in ("forward", "forward_sizes", "forward_fp16", "training_fp16"):
        (command,) = [line for line in suite.log(step).splitlines() if "moe_" in line]
        args = moe_bench.parse("", step.startswith("training"), command.partition(".py ")[2].split())
        assert args.device == "cuda" and args.skip_failing and args.csv == str(suite.out / f"{step}.csv")
        assert (args.cases[0].tokens == 50_000) == (step != "forward_sizes")


def test_a_window_runs_its_own_steps_after_the_build_and_packs_them_beside_other_files(suite):
    suite("main")
    (suite.out / "mine.log").write_text("mine")
    _, steps = suite("main", PACK="1")
    assert list(steps) == ["device", "build", "smoke", "self_check", "kernels", "forward", "training"]
    files = {path.name for path in suite.out.iterdir()}
    assert files == {"results.tar.gz", "steps.csv", "summary.md", "mine.log"}
    with tarfile.open(suite.out / "results.tar.gz") as packed:
        assert set(packed.getnames()) == {f"{step}.log" for step in steps} | {"steps.csv"}


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended_and_none_begins_without_time_left(suite):
    suite.program("python3", PYTHON.format(python=sys.executable).replace('echo "first"', "exec sleep 60"))
    (suite.tools / "sleep").symlink_to(shutil.which("sleep"))
    _, steps = suite(SECONDS_IN_ALL="11")
    assert steps.pop("device")["status"] == "timed out"
    assert {row["status"] for row in steps.values()} == {"no time left", "skipped"}


@pytest.mark.parametrize("name", ["results.csv", "training.log", "results.tar.gz"])
def test_files_of_something_else_are_left_alone(suite, name):
    suite.out.mkdir()
    (suite.out / name).write_text("of something else")
    refused = subprocess.run([shutil.which("bash"), str(SUITE), str(suite.out)], capture_output=True, text=True)
    assert refused.returncode == 2 and "name another OUTDIR" in refused.stderr
    assert (suite.out / name).read_text() == "of something else"
