"""The checks of the fault injection detect the faults that they are for."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import figures
import pytest
import torch
from campaign import Tally
from checks import Checkpoints, contents, finished_run_differs, records_differ
from damage import DAMAGE
from starts import Start

STEPS = 6


def save(path, step, value=1.0):
    state = {"step": step, "step_of_epoch": 0, "state_dict": {"w": torch.full((64, 64), value)}}
    state["optimizer"] = {
        "state": {0: {"exp_avg": torch.full((64,), value)}},
        "param_groups": [{"lr": 1e-3, "wd": 0.1}],
    }
    torch.save(state, path)


@pytest.fixture
def reference(tmp_path):
    """The files of a finished run of six steps."""
    run = tmp_path / "reference"
    (run / "checkpoints").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "model" / "README.md").write_text("a model")
    for name, step in (("epoch_1.pt", 3), ("epoch_2.pt", STEPS), ("epoch_latest.pt", STEPS)):
        save(run / "checkpoints" / name, step)
    records = [{"step": step, "loss": 1 / step, "seconds": step} for step in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "evaluations.jsonl").write_text(json.dumps({"step": STEPS, "text_to_image_R@1": 0.5}) + "\n")
    return run


@pytest.fixture
def run(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "run"))


@pytest.fixture
def draw():
    return random.Random(0)


def edit(name, old, new):
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new, 1))


LOSSES = {
    "a step twice": (
        edit("metrics.jsonl", "", '{"step": 1, "loss": 1.0, "seconds": 1}\n'),
        "metrics.jsonl has the steps",
    ),
    "a step missing": (edit("metrics.jsonl", '{"step": 2, "loss": 0.5, "seconds": 2}\n', ""), "has the steps"),
    "another loss": (edit("metrics.jsonl", "0.5", "0.50001"), "at step 2 in loss"),
    "half a line within": (edit("metrics.jsonl", '"step": 3', ""), "metrics.jsonl"),
    "an evaluation twice": (
        edit("evaluations.jsonl", "", '{"step": 6, "text_to_image_R@1": 0.5}\n'),
        "evaluations.jsonl has the steps",
    ),
    "a half-written file": (lambda run: (run / "checkpoints" / "x.tmp").touch(), "x.tmp was left behind"),
    "a file missing": (lambda run: (run / "model" / "README.md").unlink(), "model/README.md is missing"),
    "another model": (edit("model/README.md", "a", "b"), "model/README.md differs"),
    "other weights": (
        lambda run: save(run / "checkpoints" / "epoch_latest.pt", STEPS, 1.001),
        "in state_dict, optimizer",
    ),
    "an older checkpoint": (lambda run: save(run / "checkpoints" / "epoch_latest.pt", 3), "differs .* in step"),
}


def test_runs_that_differ_only_in_times_are_equal(run, reference):
    edit("metrics.jsonl", '"seconds": 4', '"seconds": 5')(run)

    assert finished_run_differs(run, reference, set()) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_each_kind_of_loss_is_detected(run, reference, loss):
    make, expected = LOSSES[loss]
    make(run)

    with pytest.raises(AssertionError, match=expected):
        assert finished_run_differs(run, reference, set()) == []


def test_an_unfinished_run_may_lack_steps_but_not_have_wrong_ones(run, reference):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.index('{"step": 5') + 9])
    assert records_differ(run, reference, complete=False) == []

    (run / "metrics.jsonl").write_text(text.replace('{"step": 2', '{"step": 7'))
    assert records_differ(run, reference, complete=False) != []


def test_values_that_are_not_finite_are_detected(run):
    save(run / "checkpoints" / "epoch_2.pt", STEPS, float("nan"))

    assert Checkpoints.of(run).not_finite == [run / "checkpoints" / "epoch_2.pt"]


@pytest.mark.parametrize("damage", [each for each in DAMAGE if each.name.startswith(("checkpoint", "I/O", "all"))])
def test_damage_to_a_checkpoint_is_detected_and_leaves_older_ones(run, damage, draw):
    said = damage.strike(run, draw)

    found = Checkpoints.of(run)
    assert found.damaged and any(path.name in said for path in found.damaged) or "all 3" in said
    assert len(found.steps) + len(found.damaged) == 3 and found.step in ((None,) if "all 3" in said else (3, STEPS))


@pytest.mark.parametrize("damage", [each for each in DAMAGE if "jsonl" in each.name or "leftovers" in each.name])
def test_damage_to_other_files_keeps_the_steps_of_the_newest_checkpoint(run, damage, draw):
    before = contents(run)

    assert damage.strike(run, draw) is not None

    whole = {name: text for name, text in contents(run).items() if not name.endswith(".jsonl")}
    assert whole == {name: text for name, text in before.items() if not name.endswith(".jsonl")}
    assert (run / "metrics.jsonl").read_text().count("\n") == STEPS or "metrics" not in damage.name
    assert any(run.rglob("*.tmp")) == ("leftovers" in damage.name)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a program in place of ``clipup``."""

    def start(program):
        monkeypatch.setattr("starts.ROOT", tmp_path)
        (tmp_path / "clipup").mkdir(exist_ok=True)
        (tmp_path / "clipup" / "__init__.py").touch()
        (tmp_path / "clipup" / "__main__.py").write_text(f"import os, signal, sys\n{program}\n")
        monkeypatch.chdir(tmp_path)
        return Start([], 1, tmp_path / "starts", tmp_path / "run")

    return start


@pytest.mark.parametrize(
    "program, ending",
    [
        ("print('60 steps')", "finished"),
        (
            "print('clipup train: stopped after step 5; to continue, run with --resume latest'); sys.exit(130)",
            "stopped",
        ),
        ("print('clipup train: stopped after step 5; to continue, run with --resume latest'); sys.exit(0)", "finished"),
        ("print('clipup train: interrupted'); sys.exit(130)", "interrupted"),
        ("print('clipup train: the disk is full'); sys.exit(2)", "refused"),
        ("print('clipup train: the disk is full'); sys.exit(3)", "crashed"),
        ("sys.exit(2)", "crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed"),  # we did not send it
        ("raise ValueError", "crashed"),
        ("raise KeyboardInterrupt", "interrupted"),
        ("print('from step 3 to step 60', flush=True); raise KeyboardInterrupt", "crashed"),
    ],
)
def test_endings_are_classified(start, program, ending):
    started = start(program)

    assert started.wait(30)
    assert started.ending() == ending


@pytest.mark.parametrize(
    "said, ending",
    [
        (
            "60 steps in 4 s of training, last loss 2.1; see logs/run",
            "finished",
        ),  # its other rank was killed after that
        ("training: 60 of 60 steps", "killed"),
        ("clipup train: rank 1 of 2 has died", "refused"),
    ],
)
def test_a_run_of_several_ranks_has_finished_when_its_last_line_is_there(start, said, ending):
    started = start("sys.exit(1)")
    assert started.wait(30)
    started.several = True
    log = started.logs / "ranks" / "0" / "stdout.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"{said}\n")
    assert started.ending() == ending


def test_processes_are_found_signalled_and_ended(start):
    started = start("if os.fork() == 0: signal.pause()\nprint('here', flush=True); signal.pause()")
    while "here" not in started.said():
        assert started.running
    workers = started.data_workers()
    assert len(workers) == 1 and sorted(started.alive()) == sorted([*started.ranks(), *workers])

    started.send(signal.SIGKILL, started.pid)

    assert started.wait(30) and started.ending() == "killed"
    assert started.clear(seconds=0) == workers and not os.path.exists(f"/proc/{started.pid}")


@pytest.mark.slow
def test_a_run_under_faults_loses_nothing(tmp_path):
    program = Path(__file__).with_name("inject.py")
    report = tmp_path / "figures.json"
    arguments = ["--seconds", "1", "--seed", "5", "--faults", "SIGKILL of the process", "truncated"]
    arguments += ["--report", str(report), "--directory", str(tmp_path)]

    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())["one process"]
    assert figures["runs"] == 1 and sum(figures["faults"].values()) >= 1 and figures["failures"] == {}


def test_figures_of_a_section_take_the_place_of_older_ones(tmp_path):
    page = tmp_path / "page.md"
    text = (
        "<!-- figures -->\n<!-- end of figures -->\n<!-- figures of soak -->\n{}\n<!-- end of figures of soak -->\nZ\n"
    )
    page.write_text(text.format("old"))
    figures.put(page, "new", "soak")
    assert page.read_text() == text.format("new")
    with pytest.raises(ValueError, match="it needs the lines <!-- figures of kills -->"):
        figures.put(page, "new", "kills")


def test_saved_figures_give_the_same_table(tmp_path):
    tally = Tally(faults=Counter({"SIGKILL": 3}), runs=1, starts=4, seconds=90.0)
    figures.write(tmp_path / "one.json", {1: tally}, seed=7)
    tallies, circumstances = figures._from_json(tmp_path / "one.json")
    assert figures.as_markdown(tallies, circumstances) == figures.as_markdown({1: tally}, figures.circumstances(7))
