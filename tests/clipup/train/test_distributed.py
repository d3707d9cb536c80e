"""Two processes under torchrun."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipup.train.checkpoints.open_clip_format import load

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ddp_run.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The directory that two gloo processes wrote."""
    out = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["dense", "siglip", "multi_positive", "balanced", "locked", "caption_alone"])
def test_two_ranks_do_what_one_process_does_on_the_same_global_batch(two_ranks, tmp_path, kind):
    runpy.run_path(str(SCRIPT))["run"](tmp_path, kind)

    contrastive = [
        [record["contrastive"] for record in metrics(out / "logs" / f"{kind}-{ranks}")]
        for out, ranks in ((two_ranks, 2), (tmp_path, 1))
    ]
    assert contrastive[0] == pytest.approx(contrastive[1], rel=1e-4)
    alone = torch.load(tmp_path / f"{kind}-1-rank_0.pt")
    for name, value in torch.load(two_ranks / f"{kind}-2-rank_0.pt").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["dense", "siglip", "sparse", "balanced", "locked", "caption_alone", "batch_norm"])
def test_two_ranks_end_with_the_same_weights(two_ranks, kind):
    first, second = (torch.load(two_ranks / f"{kind}-2-rank_{rank}.pt") for rank in range(2))

    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_only_rank_0_writes_metrics_and_checkpoints(two_ranks):
    run = two_ranks / "logs" / "sparse-2"

    records = metrics(run)
    checkpoint = load(run / "checkpoints" / "epoch_latest.pt")

    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in records[-1]["layers"].values())
    trained = torch.load(two_ranks / "sparse-2-rank_1.pt")
    assert all(torch.equal(value, trained[name]) for name, value in checkpoint["state_dict"].items())
