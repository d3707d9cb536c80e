"""``clipup train`` from the outside."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from faulty_run import in_session
from rank_processes import ranks, wait_for_lines

import clipup
from clipup.cli import main
from clipup.train import TrainOptions
from clipup.train.checkpoints.format import load


@pytest.fixture
def command(model_directory, csv_data, tmp_path):
    """The arguments of a short sparse run; more can be added."""
    usual = ["--model", model_directory, "--train-data", csv_data, "--val-data", csv_data, "--logs", tmp_path / "logs"]
    usual += ["--name", "run", "--device", "cpu", "--workers", "0", "--batch-size", "8", "--warmup", "2"]
    return ["train", *map(str, usual), "--moe", "--num-experts", "4", "--balance-weight", "0.02"]


@pytest.fixture
def run(tmp_path):
    return tmp_path / "logs" / "run"


def test_train_makes_the_model_sparse_trains_evaluates_and_saves_it(command, run, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(b"no picture")
    assert main([*command, "--epochs", "2"]) == 0

    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("6 steps") and ", 1 samples skipped; see" in line
    config = clipup.create_model_and_transforms(str(run / "model"))[0].moe_config
    assert config == clipup.MoEConfig.clip_up(num_experts=4, balance_weight=0.02, towers=("image", "text"))
    evaluations = (run / "evaluations.jsonl").read_text().splitlines()
    assert len(evaluations) == 2 and '"text_to_image_R@1": ' in evaluations[0]


@pytest.mark.parametrize(
    "when, message", [("0", "the gradient norm is nan at step"), ("10", "contains NaN or infinity")]
)
def test_a_diverging_run_ends_with_exit_code_1_one_line_and_finite_files(command, capsys, run, when, message):
    steps = ["--steps", "50", "--save-every-n-steps", "1", "--max-nonfinite-steps", when]
    assert main([*command, *steps, "--lr", "1e30"]) == 1

    error = capsys.readouterr().err.strip().splitlines()[-1]
    latest = run / "checkpoints" / "epoch_latest.pt"
    assert error.startswith("clipup train: ") and message in error and f"{latest}, are finite" in error
    assert latest.is_file() and not (run / "model").exists()


def opened(fifo):
    """A writer of a pipe, once somebody reads it."""
    with contextlib.suppress(OSError):
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


SLOW = [pytest.param(2, stop, marks=pytest.mark.slow) for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.parametrize("workers, stop", [(0, signal.SIGTERM), *SLOW])
def test_a_run_whose_data_stall_stops_at_a_signal_with_its_last_step_saved(command, run, tmp_path, workers, stop):
    """The whole session gets the signal, as from a terminal or a scheduler: the data workers too."""
    fifo, metrics = tmp_path / "fifo", run / "metrics.jsonl"
    os.mkfifo(fifo)
    more = ["--epochs", "100", "--workers", str(workers), "--val-frequency", "0"]
    with ranks(tmp_path, in_session, main, [*command, *more], count=1) as [process]:
        wait_for_lines(metrics, 1, [process])
        for image in tmp_path.glob("*.png"):
            os.link(fifo, tmp_path / "link")
            os.replace(tmp_path / "link", image)
        while (writer := opened(fifo)) is None:
            assert process.poll() is None, process.error
        time.sleep(0.2)  # a signal between two system calls does not interrupt the second one
        os.killpg(process.process.pid, stop)
        code, error = process.ended(60)
    os.close(writer)

    assert code == 130 and "Traceback" not in error, error
    assert "with --name run --resume latest" in error.strip().splitlines()[-1]
    assert load(run / "checkpoints" / "epoch_latest.pt")["step"] == metrics.read_text().count("\n")
    listed = ["ps", "-o", "stat=", "-s", str(process.process.pid)]
    deadline = time.monotonic() + 20  # what the workers started ends after them
    while set(subprocess.run(listed, capture_output=True, text=True).stdout.split()) - {"Z"}:
        assert time.monotonic() < deadline, "a process of the run goes on"
        time.sleep(0.1)


def test_every_option_of_a_run_is_a_flag_and_keeps_its_default(monkeypatch):
    taken = []
    monkeypatch.setattr("clipup.train.run.train", lambda options: taken.append(options) or sys.exit())
    monkeypatch.setattr("clipup.cli.train.check_directory", lambda *_: None)

    for arguments in ([], ["--lr", "0.25", "--num-experts", "4", "--moe", "--aug-cfg", "scale=(0.5, 1.0)", "a=b"]):
        with pytest.raises(SystemExit):
            main(["train", *arguments])

    moe_cfg = clipup.MoEConfig.clip_up(num_experts=4)
    assert taken[0] == TrainOptions()
    assert taken[1] == TrainOptions.flat(lr=0.25, moe=True, moe_cfg=moe_cfg, aug_cfg={"scale": (0.5, 1.0), "a": "b"})
