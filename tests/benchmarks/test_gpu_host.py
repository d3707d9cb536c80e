"""Host time of launches without a GPU: every launch is counted, and none needs a driver."""

import os
import subprocess
import sys
from pathlib import Path

import moe_bench
import pytest


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_launch_of_a_pass_is_timed_without_a_gpu():
    program = Path(moe_bench.__file__).parent / "gpu_host.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(program.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), "--calls", "5"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = {line[:18].strip(): line[18:].split() for line in run.stdout.splitlines()[-3:]}
    launches = {name: int(values[0]) for name, values in rows.items()}
    assert launches == {"routing": 6, "experts, forward": 3, "experts, backward": 5}
    assert all(float(values[1]) > 1 for values in rows.values())
