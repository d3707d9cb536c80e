"""The checks of the fault injection detect the faults that they are for."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import inject
import pytest
import torch
from checks import Checkpoints, differences
from faults import DAMAGE
from starts import Start

STEPS = 6


def save(path, step, value=1.0):
    group = {"lr": 1e-3, "wd": 0.1}
    optimizer = {"state": {0: {"exp_avg": torch.full((64,), value)}}, "param_groups": [group]}
    torch.save({"step": step, "state_dict": {"w": torch.full((64, 64), value)}, "optimizer": optimizer}, path)


@pytest.fixture
def reference(tmp_path):
    """The files of a finished run of six steps."""
    run = tmp_path / "reference"
    (run / "checkpoints").mkdir(parents=True)
    (run / "model").mkdir()
    for name in ("model/README.md", "options.json"):
        (run / name).write_text("a text")
    for name, step in (("epoch_1.pt", 3), ("epoch_2.pt", STEPS), ("epoch_latest.pt", STEPS)):
        save(run / "checkpoints" / name, step)
    records = [{"step": step, "loss": 1 / step, "seconds": step} for step in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "evaluations.jsonl").write_text(json.dumps({"step": STEPS, "text_to_image_R@1": 0.5}) + "\n")
    return run


@pytest.fixture
def run(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "run"))


def edit(name, old, new):
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new, 1))


LOSSES = (
    (edit("metrics.jsonl", "", '{"step": 1, "loss": 1.0, "seconds": 1}\n'), "metrics.jsonl differs"),
    (edit("metrics.jsonl", '{"step": 2, "loss": 0.5, "seconds": 2}\n', ""), "metrics.jsonl differs"),
    (edit("metrics.jsonl", "0.5", "0.50001"), "'loss': 0.50001"),
    (edit("evaluations.jsonl", "", '{"step": 6, "text_to_image_R@1": 0.5}\n'), "evaluations.jsonl .* 2 records for 1"),
    (lambda run: (run / "checkpoints" / "x.tmp").touch(), "x.tmp was left behind"),
    (lambda run: (run / "model" / "README.md").unlink(), "model/README.md is missing"),
    (edit("model/README.md", "a", "b"), "model/README.md differs"),
    (lambda run: save(run / "checkpoints" / "epoch_latest.pt", STEPS, 1.001), "in state_dict, optimizer"),
    (lambda run: save(run / "checkpoints" / "epoch_latest.pt", 3), "differs .* in step"),
)


@pytest.mark.parametrize("loss, expected", LOSSES)
def test_each_kind_of_loss_is_detected(run, reference, loss, expected):
    edit("metrics.jsonl", '"seconds": 4', '"seconds": 5')(run)
    assert differences(run, reference, finished=True) == []
    loss(run)
    (wrong,) = differences(run, reference, finished=True)
    assert re.search(expected, wrong)


def test_values_that_are_not_finite_are_detected(run):
    save(run / "checkpoints" / "epoch_2.pt", STEPS, float("nan"))
    assert Checkpoints.of(run).not_finite == [run / "checkpoints" / "epoch_2.pt"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.name)
def test_damage_is_done_and_seen(run, reference, damage):
    said = damage.strike(run, random.Random(0))
    found = Checkpoints.of(run)
    if damage.name.startswith(("checkpoint", "I/O", "all")):
        assert found.damaged and found.step in ((None,) if "all 3" in said else (3, STEPS))
    else:
        assert not found.damaged and any(run.rglob("*.tmp")) == ("leftovers" in damage.name)
        assert differences(run, reference, finished=False) == []


@pytest.mark.parametrize(
    "program, ending",
    [
        ("print('60 steps')", "finished"),
        ("print('clipup train: stopped after step 5; run with --resume latest'); sys.exit(130)", "stopped"),
        ("print('clipup train: interrupted'); sys.exit(130)", "interrupted"),
        ("print('clipup train: the disk is full'); sys.exit(2)", "refused"),
        ("print('clipup train: the disk is full'); sys.exit(7)", "crashed"),
        ("sys.exit(2)", "crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed"),  # we did not send it
        ("raise ValueError", "crashed"),
        ("raise KeyboardInterrupt", "interrupted"),
        ("print('from step 3 to step 60', flush=True); raise KeyboardInterrupt", "crashed"),
    ],
)
def test_endings_are_classified(tmp_path, monkeypatch, program, ending):
    (tmp_path / "clipup.py").write_text(f"import os, signal, sys\n{program}\n")
    monkeypatch.setattr("starts.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    start = Start([], 1, tmp_path / "starts")
    assert start.wait(30) and start.ending() == ending


@pytest.mark.slow
def test_a_run_under_faults_loses_nothing(tmp_path, capsys):
    arguments = ["--seconds", "1", "--seed", "5", "--faults", "SIGKILL of the process", "truncated"]
    assert inject.main([*arguments, "--directory", str(tmp_path)]) == 0
    assert "| **runs to the end** | **1** |" in capsys.readouterr().out
