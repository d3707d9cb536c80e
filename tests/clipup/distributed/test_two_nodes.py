"""Two launchers, as on two nodes, train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from workload import Workload

ROOT = Path(__file__).parents[3]
DIVIDED_ALIKE = ["--router-noise", "0", "--capacity-factor", "None", "--loss-scope", "global_batch", "--workers", "0"]
"""Options with which a step does not depend on how its batch is divided."""


def start(*program, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, *map(str, program)], env=environment, stderr=subprocess.PIPE, text=True)


def records(directory, kind):
    return [json.loads(line) for line in (directory / f"{kind}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--fsdp"], ["--fsdp", "--ep", "2"]], ids=" ".join)
def test_two_launchers_train_the_demo_to_the_loss_of_one_process(tmp_path, how):
    one, two = Workload(tmp_path, 1), Workload(tmp_path, 2)
    one.make()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{port}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-id=demo"]
    divided = two.command(tmp_path, "two", *DIVIDED_ALIKE, *how)
    programs = [start(*launcher, "-m", "clipup", "--", *divided) for _ in range(2)]
    programs.append(start("-m", "clipup", *one.command(tmp_path, "one", *DIVIDED_ALIKE)))
    for program in programs:
        _, error = program.communicate(timeout=300)
        assert program.returncode == 0, error

    losses = [[record["loss"] for record in records(tmp_path / name, "metrics")] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    found, expected = (records(tmp_path / name, "evaluations")[-1] for name in ("two", "one"))
    recalls = [name for name in expected if "_R@" in name]
    assert len(recalls) == 7 and [found[name] for name in recalls] == [expected[name] for name in recalls]
