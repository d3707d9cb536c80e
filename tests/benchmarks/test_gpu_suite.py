"""The script for a machine with a GPU, run with stand-ins for its tools: its order, its patience and its records."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import moe_bench
import pytest
from platforms import linux_only

pytestmark = linux_only
SUITE = Path(moe_bench.__file__).parent / "gpu_suite.sh"
TOOLS = "bash sh cat cp cut dirname env find grep gzip mkdir mktemp mv rm sleep tail tar timeout tr".split()
PYTHON = """#!/bin/sh
case "$*" in
  *gpu_summary.py*) exec {python} "$@" ;;
  *moe_training.py*--dtype\\ bf16*) echo 'RuntimeError: "broken", badly'; exit 3 ;;
  *"import open_clip"* | *"import xdist"* | *"-m clipup "*) exit 1 ;;  # a machine with torch alone
  *pytest*) echo "ran $*"; echo "3 passed, 2 skipped in 1.00s" ;;
  *self_check*) echo "ran $*"; echo "39 checks, 0 failed" ;;
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
        with self.started(*windows, **environment) as process:
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr), self.steps()

    def started(self, *windows, **environment):
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        environment = inherited | {"PATH": str(self.tools)} | environment
        command = [shutil.which("bash"), str(SUITE), str(self.out), *windows]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def steps(self):
        with (self.out / "steps.csv").open() as file:
            return {row["step"]: row for row in csv.DictReader(file)}

    def log(self, step):
        return (self.out / f"{step}.log").read_text()


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all windows: the suite, the finished process and the steps."""
    suite = Suite(tmp_path_factory.mktemp("suite"))
    echoes = '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING sanitizer $*"; echo "1 passed"\n'
    suite.program("compute-sanitizer", echoes)
    return suite, *suite()


def test_a_failed_step_is_recorded_and_the_next_runs_and_missing_tools_are_skipped_by_name(whole):
    suite, result, steps = whole
    assert result.returncode == 1 and (suite.out / "summary.md").read_text() in result.stdout
    unwell = {name: row["status"] for name, row in steps.items() if row["status"] != "ok"}
    assert unwell == dict.fromkeys(("training", "training_sizes"), "failed") | dict.fromkeys(
        ("clip_inference", "clip_training"), "skipped"
    )
    assert steps["training"]["words"] == "RuntimeError: broken badly"
    assert steps["clip_training"]["words"] == "needs open_clip"


def test_steps_run_in_order_of_importance_with_options_that_the_programs_accept(whole):
    suite, _, steps = whole
    order = ["device", "self_check", "kernels", "forward", "training", "smoke", "choices", "build", "cuda_tests"]
    assert list(steps)[: len(order)] == order
    for step in ("forward", "forward_sizes", "forward_fp16", "training_fp16"):
        (command,) = [line for line in suite.log(step).splitlines() if "moe_" in line]
        args = moe_bench.parse("", step.startswith("training"), command.partition(".py ")[2].split())
        assert args.device == "cuda" and args.skip_failing and args.csv == str(suite.out / f"{step}.csv")
        assert (args.cases[0].tokens == 50_000) == (step != "forward_sizes")


def test_a_window_runs_its_own_steps_and_packs_them_beside_other_files(suite):
    suite("main")
    (suite.out / "mine.log").write_text("mine")
    _, steps = suite("main", PACK="1")
    assert list(steps) == ["device", "self_check", "kernels", "forward", "training", "smoke"]
    files = {path.name for path in suite.out.iterdir()}
    assert files == {"results.tar.gz", "steps.csv", "summary.md", "mine.log"}
    with tarfile.open(suite.out / "results.tar.gz") as packed:
        assert set(packed.getnames()) == {f"{step}.log" for step in steps} | {"steps.csv", "summary.md"}


@pytest.mark.parametrize("pack", ["0", "1"])
@pytest.mark.parametrize("killed_by", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_it_has_found(suite, killed_by, pack):
    slow = '*moe_forward*--dtype\\ bf16*) echo "half a table"; exec sleep 60 ;;\n  *gpu_summary'
    suite.program("python3", PYTHON.format(python=sys.executable).replace("*gpu_summary", slow, 1))
    with suite.started("main", PACK=pack) as process:
        while not (suite.out / "forward.log").exists() or not suite.log("forward"):
            time.sleep(0.02)
        process.send_signal(killed_by)
        process.communicate()
    ended = ["device", "self_check", "kernels"]
    stopped = ["forward"] if killed_by == signal.SIGTERM else []
    assert list(suite.steps()) == ended + stopped and process.returncode in (143, -9)
    assert all(suite.steps()[step]["status"] == "stopped" for step in stopped)
    assert (suite.out / "summary.md").read_text().endswith("the run has not ended\n")
    whole = ended + stopped if pack == "1" else []
    if whole:
        with tarfile.open(suite.out / "results.tar.gz") as packed:
            assert {name for name in packed.getnames() if name.endswith(".log")} == {f"{step}.log" for step in whole}
    for step in {*ended, "forward"} - {*whole}:
        assert suite.log(step)


def test_a_step_that_checks_nothing_is_a_failure(suite):
    idle = PYTHON.format(python=sys.executable).replace("3 passed, 2", "10").replace("39 checks", "0 checks")
    suite.program("python3", idle)
    result, steps = suite("main")
    nothing = {name for name, row in steps.items() if row["status"] == "checked nothing"}
    assert nothing == {"self_check", "smoke"} and result.returncode == 1


def test_a_wheel_in_two_halves_is_joined_and_folders_of_its_pth_files_are_found(suite, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, text in (("a-1.whl", "a"), ("b-1.whl.0", "left "), ("b-1.whl.1", "right")):
        (wheels / name).write_text(text)
    pip = """*--target*)
    shift 7; cat "$2" "$3"; mkdir -p "$1/hidden"; echo hidden > "$1/b.pth"; echo > "$1/hidden/found.py" ;;
  *get_device_name*) exec {python} -c "import found; print(found.__file__)" ;;
  *gpu_summary"""
    suite.program("python3", PYTHON.replace("*gpu_summary", pip, 1).format(python=sys.executable))
    _, steps = suite("choices", WHEELS=str(wheels))
    assert suite.log("wheels") == "aleft right"
    assert steps["device"]["status"] == "ok" and suite.log("device").endswith("hidden/found.py\n")


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended_and_none_begins_without_time_left(suite):
    suite.program("python3", PYTHON.format(python=sys.executable).replace('echo "first"', "exec sleep 60"))
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
