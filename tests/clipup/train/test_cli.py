"""``clipup train`` from the outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.fixture
def start(command, tmp_path):
    """Starts the program, with further arguments."""

    def start(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        usual = {
            "env": environment,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
            "cwd": tmp_path,
        }
        return subprocess.Popen([sys.executable, "-m", "clipup", *command, *more], **usual)

    return start


@pytest.fixture
def run(tmp_path):
    return tmp_path / "logs" / "run"


def steps_saved(run):
    return load(run / "checkpoints" / "epoch_latest.pt")["step"]


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("the program has ended, or does not come this far")


def lines(path):
    return path.read_text().count("\n") if path.is_file() else 0


def test_train_makes_the_model_sparse_trains_evaluates_and_saves_it(command, run, capsys):
    assert main([*command, "--epochs", "2"]) == 0

    assert "6 steps" in capsys.readouterr().out
    config = clipup.create_model_and_transforms(str(run / "model"))[0].moe_config
    assert config == clipup.MoEConfig.clip_up(num_experts=4, balance_weight=0.02, towers=("image", "text"))
    evaluations = (run / "evaluations.jsonl").read_text().splitlines()
    assert len(evaluations) == 2 and '"text_to_image_R@1": ' in evaluations[0]
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoints", "evaluations.jsonl", "metrics.jsonl", "model", "options.json", "out.log"}


def test_skipped_samples_are_counted_in_the_last_line_and_on_mostly_missing_data_no_run_starts(
    command, run, tmp_path, capsys
):
    (tmp_path / "3.png").unlink()
    (tmp_path / "11.png").write_bytes(b"no picture")
    assert main([*command, "--epochs", "2"]) == 0
    assert ", 2 samples skipped; see" in capsys.readouterr().out.strip().splitlines()[-1]
    assert "2 samples skipped" in (run / "out.log").read_text()

    for row in range(4, 24):
        (tmp_path / f"{row}.png").unlink(missing_ok=True)
    assert main([*command, "--epochs", "2", "--name", "other"]) == 2
    assert "clipup train: --max-skipped: 21 of 24 samples" in capsys.readouterr().err
    assert not run.with_name("other").exists()


@pytest.mark.parametrize(
    "when, message", [("0", "the gradient norm is nan at step"), ("10", "contains NaN or infinity")]
)
def test_a_diverging_run_ends_with_exit_code_1_one_line_and_finite_files(command, capsys, run, when, message):
    steps = ["--steps", "50", "--save-every-n-steps", "1", "--max-nonfinite-steps", when]
    assert main([*command, *steps, "--lr", "1e30"]) == 1

    error = capsys.readouterr().err.strip().splitlines()[-1]
    latest = run / "checkpoints" / "epoch_latest.pt"
    assert error.startswith("clipup train: ") and message in error and f"{latest}, are finite" in error
    assert all(value.isfinite().all() for value in load(latest)["state_dict"].values())
    assert not (run / "model").exists()


def of_session(leader):
    """Processes of a session that live, in ps's words."""
    listed = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(leader)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]


def opened(fifo):
    """A writer of a pipe, once somebody reads it."""
    with contextlib.suppress(OSError):
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


ALL = [("csv", 2, stop) for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (*ALL, ("csv", 2, None), ("program", 0, None))]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.parametrize("kind, workers, to_all", [("csv", 0, None), ("program", 1, None), *SLOW])
def test_a_run_whose_data_stall_stops_at_a_signal_with_its_last_step_saved(
    start, run, csv_data, shards, tmp_path, kind, workers, to_all
):
    fifo, metrics = tmp_path / "fifo", run / "metrics.jsonl"
    os.mkfifo(fifo)
    more = ["--epochs", "100", "--workers", str(workers), "--val-frequency", "0"]
    if kind == "program":
        more += ["--train-data", f"pipe:exec cat {fifo}", "--dataset-type", "webdataset", "--allow-pipe"]
        more += ["--train-num-samples", "8"]
    process = start(*more)
    if kind == "program":  # delivers once, and then nothing
        with open(wait_for(lambda: opened(fifo), process), "wb") as first:
            os.set_blocking(first.fileno(), True)
            first.write((tmp_path / "train-0.tar").read_bytes())
    wait_for(lambda: lines(metrics), process)
    for image in tmp_path.glob("*.png"):
        os.link(fifo, tmp_path / "link")
        os.replace(tmp_path / "link", image)
    writer = wait_for(lambda: opened(fifo), process)
    time.sleep(0.2)  # a signal between two system calls does not interrupt the second one

    if to_all is None:
        process.terminate()
    else:
        os.killpg(process.pid, to_all)  # as a terminal or a scheduler does: the data workers get it too
    error = process.communicate(timeout=60)[1]

    os.close(writer)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert "with --name run --resume latest" in error.strip().splitlines()[-1]
    assert steps_saved(run) == lines(metrics)
    assert of_session(process.pid) == []


def test_every_option_of_a_run_is_a_flag_and_keeps_its_default(monkeypatch):
    taken = []
    monkeypatch.setattr("clipup.train.run.train", lambda options: taken.append(options) or sys.exit())
    monkeypatch.setattr("clipup.cli.train.check_directory", lambda *_: None)

    for arguments in ([], ["--lr", "0.25", "--num-experts", "4", "--moe", "--aug-cfg", "scale=(0.5, 1.0)", "a=b"]):
        with pytest.raises(SystemExit):
            main(["train", *arguments])

    moe_cfg = clipup.MoEConfig.clip_up(num_experts=4)
    assert taken[0] == TrainOptions()
    assert taken[1] == TrainOptions(lr=0.25, moe=True, moe_cfg=moe_cfg, aug_cfg={"scale": (0.5, 1.0), "a": "b"})


@pytest.mark.parametrize(
    "arguments, flag",
    [
        (["--fsdp-replicas", "2"], "--fsdp-replicas"),
        (["--torchcompile-mode", "default"], "--torchcompile-mode"),
        (["--epochs-cooldown", "2"], "--epochs-cooldown"),
        (["--momentum", "0.9"], "--momentum"),
        (["--opt", "nadamw", "--fused", "True"], "--fused"),
        (["--distill-pretrained", "openai"], "--distill-pretrained"),
        (["--siglip", "--no-local-loss"], "--no-local-loss"),
        (["--name", "b", "--force", "--resume", "latest"], "--force"),
    ],
)
def test_flags_without_effect_are_refused(capsys, arguments, flag):
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"clipup train: {flag} has no effect")
