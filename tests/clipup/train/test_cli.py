"""``clipup train`` from the outside."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

import clipup
from clipup.cli import main
from clipup.train import TrainOptions
from clipup.train.checkpoints.open_clip_format import load

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(model_directory, csv_data, tmp_path):
    """The arguments of a short sparse run; more can be added."""
    usual = ["--model", model_directory, "--train-data", csv_data, "--val-data", csv_data, "--logs", tmp_path / "logs"]
    usual += ["--name", "run", "--device", "cpu", "--workers", "0", "--batch-size", "8", "--warmup", "2"]
    return ["train", *map(str, usual), "--moe", "--num-experts", "4", "--balance-weight", "0.02"]


def test_train_makes_the_model_sparse_trains_evaluates_and_saves_it(command, tmp_path, capsys):
    assert main([*command, "--epochs", "2"]) == 0

    run = tmp_path / "logs" / "run"
    assert "6 steps" in capsys.readouterr().out
    config = clipup.create_model_and_transforms(str(run / "model"))[0].moe_config
    assert config == clipup.MoEConfig.clip_up(num_experts=4, balance_weight=0.02, towers=("image", "text"))
    evaluations = (run / "evaluations.jsonl").read_text().splitlines()
    assert len(evaluations) == 2 and '"text_to_image_R@1": ' in evaluations[0]
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoints", "evaluations.jsonl", "metrics.jsonl", "model", "options.json", "out.log"}


@pytest.mark.parametrize(
    "when, message",
    [("0", "the gradient norm is nan at step"), ("10", "contains NaN or infinity, so nothing can be ranked")],
    ids=["in training", "in evaluation"],
)
def test_a_diverging_run_ends_with_exit_code_1_one_line_and_finite_files(command, capsys, tmp_path, when, message):
    steps = ["--steps", "50", "--save-every-n-steps", "1", "--max-nonfinite-steps", when]
    assert main([*command, *steps, "--lr", "1e30"]) == 1

    error = capsys.readouterr().err.strip().splitlines()[-1]
    latest = tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt"
    assert f"clipup train: {message}" in error.replace("image_features ", "")
    assert f"all values in the last checkpoint, {latest}, are finite. Lower lr" in error
    assert all(value.isfinite().all() for value in load(latest)["state_dict"].values())
    assert not (tmp_path / "logs" / "run" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_says_how_to_continue_and_exits_with_130(command, tmp_path, capsys, stop):
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "clipup", *command, "--steps", "100000", "--workers", "2"]
    process = subprocess.Popen(
        program, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    started = time.monotonic()
    while not (log.is_file() and log.read_text().count("\n") >= 4):
        assert time.monotonic() < started + 60
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=0.05) is None, process.communicate()[1]

    os.killpg(process.pid, stop)  # as a terminal or a scheduler does: the data workers get it too
    error = process.communicate(timeout=60)[1]

    assert process.returncode == 130, error
    assert "with --name run --resume latest" in error.strip().splitlines()[-1] and "Traceback" not in error
    done = load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")["step"]
    assert main([*command, "--steps", str(done + 2), "--resume", "latest"]) == 0
    assert f"{done + 2} steps" in capsys.readouterr().out
    assert torch.isfinite(clipup.create_model_and_transforms(str(tmp_path / "logs/run/model"))[0].logit_scale)


def of_session(leader):
    """Processes of a session that live, by their command."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            before, _, after = stat.read_text().rpartition(")")
            state, _, _, session = after.split()[:4]
            if int(session) == leader and state != "Z":
                found.append(before)
    return found


def opened(fifo, process):
    """A writer of a pipe, once somebody reads it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=1)[1])


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.parametrize("kind, workers", [("csv", 0), ("csv", 2), ("program", 0), ("program", 1)])
def test_a_run_whose_data_stall_stops_at_a_sigterm_with_its_last_step_saved(
    command, csv_data, shards, tmp_path, kind, workers
):
    fifo, log = tmp_path / "fifo", tmp_path / "logs" / "run" / "metrics.jsonl"
    os.mkfifo(fifo)
    program = [sys.executable, "-m", "clipup", *command, "--epochs", "100", "--workers", str(workers)]
    program += ["--val-frequency", "0"]
    if kind == "program":
        program += ["--train-data", f"pipe:exec cat {fifo}", "--dataset-type", "webdataset", "--allow-pipe"]
        program += ["--train-num-samples", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        program, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    if kind == "program":  # delivers once, and then nothing
        with open(opened(fifo, process), "wb") as first:
            os.set_blocking(first.fileno(), True)
            first.write((tmp_path / "train-0.tar").read_bytes())
    while not (log.is_file() and log.read_text()) and process.poll() is None:
        time.sleep(0.02)
    for image in tmp_path.glob("*.png"):
        os.link(fifo, tmp_path / "link")
        os.replace(tmp_path / "link", image)
    writer = opened(fifo, process)

    process.terminate()
    error = process.communicate(timeout=60)[1]

    os.close(writer)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    done = load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")["step"]
    assert done == log.read_text().count("\n")
    assert of_session(process.pid) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_run_whose_terminal_is_closed_saves_and_can_be_resumed(command, tmp_path, capsys):
    log = tmp_path / "logs" / "run" / "metrics.jsonl"
    master, terminal = os.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "clipup", *command, "--steps", "100000", "--workers", "2"],
        env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=tmp_path,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    started = time.monotonic()
    while not (log.is_file() and log.read_text().count("\n") >= 4):
        assert time.monotonic() < started + 60 and process.poll() is None
        os.read(master, 1 << 16)

    os.close(master)  # the kernel sends SIGHUP, and whoever writes to the terminal gets an error

    assert process.wait(timeout=60) == 130
    done = load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")["step"]
    assert main([*command, "--steps", str(done + 2), "--resume", "latest"]) == 0
    assert f"{done + 2} steps" in capsys.readouterr().out


def test_every_option_of_a_run_is_a_flag_and_keeps_its_default(monkeypatch):
    taken = []
    monkeypatch.setattr("clipup.train.run.train", lambda options: taken.append(options) or sys.exit())
    monkeypatch.setattr("clipup.cli.train.check_directory", lambda *_: None)

    for arguments in ([], ["--lr", "0.25", "--num-experts", "4", "--moe"]):
        with pytest.raises(SystemExit):
            main(["train", *arguments])

    changed = TrainOptions(lr=0.25, moe=True, moe_cfg=clipup.MoEConfig.clip_up(num_experts=4))
    assert taken == [TrainOptions(), changed]
