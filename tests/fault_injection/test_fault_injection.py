"""The checks of the fault injection detect the faults that they are for."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import inject
import pytest
import torch
from checks import checkpoints, differences, newest_step
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


@pytest.mark.parametrize(
    "name, loss",
    [
        ("metrics.jsonl", edit("metrics.jsonl", "", '{"step": 1, "loss": 1.0, "seconds": 1}\n')),
        ("metrics.jsonl", edit("metrics.jsonl", '{"step": 2, "loss": 0.5, "seconds": 2}\n', "")),
        ("metrics.jsonl", edit("metrics.jsonl", "0.5", "0.50001")),
        ("evaluations.jsonl", edit("evaluations.jsonl", "", '{"step": 6, "text_to_image_R@1": 0.5}\n')),
        ("checkpoints/x.tmp", lambda run: (run / "checkpoints" / "x.tmp").touch()),
        ("model/README.md", lambda run: (run / "model" / "README.md").unlink()),
        ("model/README.md", edit("model/README.md", "a", "b")),
        ("checkpoints/epoch_latest.pt", lambda run: save(run / "checkpoints" / "epoch_latest.pt", STEPS, 1.001)),
        ("checkpoints/epoch_latest.pt", lambda run: save(run / "checkpoints" / "epoch_latest.pt", 3)),
    ],
)
def test_each_kind_of_loss_is_detected(run, reference, name, loss):
    edit("metrics.jsonl", '"seconds": 4', '"seconds": 5')(run)
    assert differences(run, reference, finished=True) == []
    loss(run)
    assert differences(run, reference, finished=True) == [name]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_done_and_seen(run, reference, kind):
    DAMAGE[kind](run, random.Random(0))
    if "checkpoint" in kind:
        assert -1 in checkpoints(run).values() and (newest_step(run) == 0) == kind.startswith("all")
    else:
        assert -1 not in checkpoints(run).values() and any(run.rglob("*.tmp")) == ("leftovers" in kind)
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
        ("import atexit, _thread\natexit.register(lambda: (_thread.interrupt_main(), [0] * 9, print()))", "finished"),
        ("print('from step 3 to step 60', flush=True); raise KeyboardInterrupt", "crashed"),
    ],
)
def test_endings_are_classified(tmp_path, monkeypatch, program, ending):
    command = [sys.executable, "-c", f"import os, signal, sys\n{program}"]
    monkeypatch.setattr("starts.cli.main", lambda arguments: os.execv(command[0], command))
    start = Start([], 1, tmp_path)
    assert not start.wait(30) and start.ending() == ending


@pytest.mark.slow
def test_a_run_under_faults_loses_nothing(capsys):
    arguments = ["--seconds", "1", "--seed", "5", "--faults", "SIGKILL to the process", "truncated"]
    assert inject.main(arguments) == 0
    assert " 1 runs to the end" in capsys.readouterr().out
