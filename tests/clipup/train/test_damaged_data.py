"""Training on partly unreadable data: what the run reports, and that a resumed run equals the uninterrupted one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from clipup.cli import main
from clipup.train import Every, TrainingInterrupted, train

ROOT = Path(__file__).parents[3]


@pytest.fixture
def damaged_csv(csv_data, tmp_path):
    """24 rows of which one lost its image and one has a broken one."""
    (tmp_path / "3.png").unlink()
    (tmp_path / "11.png").write_bytes(b"no picture")
    return csv_data


@pytest.fixture
def command(model_directory, tmp_path):
    usual = ["--model", model_directory, "--logs", tmp_path / "logs", "--name", "run", "--device", "cpu"]
    usual += ["--workers", "0", "--batch-size", "4", "--warmup", "2"]
    return ["train", *map(str, usual)]


@pytest.mark.parametrize("cache", [[], ["--cache-data"]])
def test_the_last_line_says_how_many_samples_were_skipped(command, damaged_csv, tmp_path, capsys, cache):
    assert main([*command, "--train-data", damaged_csv, "--epochs", "3", *cache]) == 0

    assert ", 2 samples skipped; see" in capsys.readouterr().out.strip().splitlines()[-1]
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "epoch 3 done at step 15; 2 samples skipped" in log


def test_a_run_on_mostly_missing_data_does_not_start(command, csv_data, tmp_path, capsys):
    for n in range(4, 24):
        (tmp_path / f"{n}.png").unlink()

    assert main([*command, "--train-data", csv_data, "--epochs", "1"]) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "clipup train: --max-skipped: 20 of 24 samples cannot be read" in error and "raise --max-skipped" in error
    assert not (tmp_path / "logs").exists()
    assert main([*command, "--train-data", csv_data, "--epochs", "1", "--max-skipped", "0.9"]) == 0


def stop_in(step):
    calls = []

    def send(model):
        calls.append(model)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Every(1, send)


SLOW_SOURCES = [pytest.param(source, marks=pytest.mark.slow) for source in ("csv", "cached csv", "webdataset")]


@pytest.mark.parametrize("source", ["csv with workers", "streamed", *SLOW_SOURCES])
def test_a_resumed_run_on_damaged_data_equals_the_uninterrupted_one(
    source, make_model, options, csv_data, shards, tmp_path
):
    """Every epoch meets the unreadable rows, before and after the interruption."""
    for n in (2, 5, 11):
        (tmp_path / f"{n}.png").write_bytes(b"no picture")
    path = tmp_path / "train-0.tar"
    content = path.read_bytes()
    start = content.index(b"\x89PNG", content.index(b"4.png"))
    path.write_bytes(content[: start + 4] + bytes(30) + content[start + 34 :])
    settings = {"train_data": csv_data, "workers": 2 * ("workers" in source), "cache_data": "cached" in source}
    if source in ("webdataset", "streamed"):
        settings = {"train_data": shards, "workers": 0}
    if source == "streamed":
        settings |= {"train_data": f"file:{shards}", "train_num_samples": 24}

    def run(callbacks=(), **changes):
        return train(
            options(steps=8, batch_size=8, max_skipped=0.2, **settings, **changes),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=True),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
            callbacks=callbacks,
        )

    whole = run(name="whole")
    with pytest.raises(TrainingInterrupted):
        run(callbacks=[stop_in(5)])
    torch.rand(17)
    resumed = run(resume="latest")

    assert resumed.skipped == whole.skipped == (1 if source in ("webdataset", "streamed") else 3)
    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_samples_that_two_ranks_skip_are_counted_once(command, damaged_csv, tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561"]
    run = [*program, "-m", "clipup", "--", *command, "--train-data", damaged_csv, "--epochs", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stderr
    assert ", 2 samples skipped; see" in done.stdout
    metrics = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["epoch"] == 3


def test_an_error_of_a_data_worker_is_reported_in_one_line(command, csv_data, tmp_path, capsys):
    """Without the worker's traceback, which torch puts into the message."""
    with gzip.open(tmp_path / "train.tar", "wb") as file:
        file.write(bytes(10_240))
    options = [
        "--train-data",
        str(tmp_path / "train.tar"),
        "--dataset-resampled",
        "--train-num-samples",
        "8",
        "--epochs",
        "1",
        "--workers",
        "1",
    ]
    assert main([*command, *options]) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("clipup train: ") and "Traceback" not in error and "Caught" not in error
    assert "train.tar: it is not an uncompressed tar file" in error
