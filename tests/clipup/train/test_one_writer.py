"""One run per directory at a time; half-written files of a killed run are removed, and it resumes exactly."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from clipup.locks import DirectoryInUse
from clipup.train import train
from clipup.train.checkpoints.open_clip_format import load

SCRIPT = Path(__file__).with_name("killed_run.py")
ROOT = Path(__file__).parents[3]


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.slow
def test_a_run_in_use_is_refused_and_a_killed_one_is_taken_over_without_a_trace(tmp_path, pairs):
    script = runpy.run_path(str(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(SCRIPT), str(tmp_path)]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "half\n"
            before = files(tmp_path)
            with pytest.raises(DirectoryInUse, match=rf"run is in use by process {process.pid} on .*--name"):
                train(script["options"](str(tmp_path), resume="latest"), model=script["model"](), loader=pairs())
            with pytest.raises(DirectoryInUse):
                train(script["options"](str(tmp_path), force=True), model=script["model"](), loader=pairs())
            assert files(tmp_path) == before
        finally:
            process.kill()
    run = tmp_path / "run"
    assert len(list((run / "checkpoints").glob(".writing.*.tmp"))) == 1
    assert load(run / "checkpoints" / "epoch_latest.pt")["step"] == 2

    resumed = train(script["options"](str(tmp_path), resume="latest"), model=script["model"](), loader=pairs())

    whole = train(script["options"](str(tmp_path), name="whole"), model=script["model"](), loader=pairs())
    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert files(run) == files(tmp_path / "whole")
    assert files(tmp_path / "whole") == [
        *("checkpoints", "checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt", "checkpoints/epoch_latest.pt"),
        *("metrics.jsonl", "options.json", "out.log"),
    ]
