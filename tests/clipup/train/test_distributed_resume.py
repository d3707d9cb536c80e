"""With two processes under torchrun, every rank skips, resumes, finishes and refuses alike."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from clipup.train.checkpoints.open_clip_format import load

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ddp_resume.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory that two gloo processes wrote."""
    out = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(params=[0, 1])
def found(out, request):
    """What a rank saw."""
    return json.loads((out / f"rank_{request.param}.json").read_text())


def test_a_nan_on_one_rank_skips_the_step_on_all(found):
    assert found["finite"]
    assert found["skipped"] in ([0, 1, 1], [])  # rank 0 alone has records


def test_a_finished_run_does_not_change_and_a_resumed_one_equals_the_uninterrupted_one(found):
    assert found["idle"] and found["same"]


def test_a_run_that_diverges_stops_on_every_rank_with_its_last_checkpoint(out, found):
    assert "is nan at step 2" in found["stopped"] and "epoch_latest.pt, are finite" in found["stopped"]


def test_what_rank_0_refuses_to_resume_from_is_refused_on_every_rank(found):
    assert "none can be used" in found["refused latest"]
    assert "epoch_latest.pt is damaged" in found["refused epoch_latest"]


def test_an_earlier_checkpoint_of_a_run_is_refused_on_every_rank(found):
    assert (
        "epoch_1.pt was written at step 2, and its run has gone on: epoch_latest.pt was written at step 4"
        in found["back"]
    )


def test_another_number_of_ranks_is_refused_within_an_epoch_and_accepted_at_its_end(out):
    run = runpy.run_path(str(SCRIPT))["run"]

    with pytest.raises(ValueError, match=r"within epoch 3, after step 1 of 2; with world_size 2 -> 1 the rest"):
        run(out, name="run", steps=8, resume="latest")
    resumed = run(out, name="other", steps=8, resume=str(out / "run" / "checkpoints" / "epoch_2.pt"))

    assert resumed.steps == 8
    assert load(resumed.directory / "checkpoints" / "epoch_latest.pt")["samples_seen"] == 4 * 8 + 4 * 4
    assert "world_size 2 -> 1" in (resumed.directory / "out.log").read_text()
