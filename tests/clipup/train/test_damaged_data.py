"""Training on partly unreadable data: what the run reports, and that a resumed run equals the uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch

from clipup.cli import main
from clipup.train import Every, TrainingInterrupted, train

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(model_directory, csv_data, tmp_path):
    usual = ["--model", model_directory, "--logs", tmp_path / "logs", "--name", "run", "--device", "cpu"]
    usual += ["--workers", "0", "--batch-size", "4", "--warmup", "2", "--train-data", csv_data]
    return ["train", *map(str, usual)]


def damage(tmp_path, *rows):
    (tmp_path / f"{rows[0]}.png").unlink()
    for row in rows[1:]:
        (tmp_path / f"{row}.png").write_bytes(b"no picture")


def test_the_last_line_says_how_many_samples_were_skipped_and_on_mostly_missing_data_no_run_starts(
    command, tmp_path, capsys
):
    damage(tmp_path, 3, 11)
    assert main([*command, "--epochs", "2"]) == 0
    assert ", 2 samples skipped; see" in capsys.readouterr().out.strip().splitlines()[-1]
    assert "epoch 2 done at step 10; 2 samples skipped" in (tmp_path / "logs" / "run" / "out.log").read_text()

    for row in range(4, 24):
        (tmp_path / f"{row}.png").unlink()
    assert main([*command, "--epochs", "2", "--name", "other"]) == 2
    assert "clipup train: --max-skipped: 21 of 24 samples" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "logs" / "other").exists()


def stop_in(step):
    calls = []

    def send(model):
        calls.append(model)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Every(1, send)


SLOW_SOURCES = [
    pytest.param(source, marks=pytest.mark.slow) for source in ("csv with workers", "cached csv", "webdataset")
]


@pytest.mark.parametrize("source", ["csv", "streamed", *SLOW_SOURCES])
def test_a_resumed_run_on_damaged_data_equals_the_uninterrupted_one(
    source, make_model, options, csv_data, shards, tmp_path
):
    """Every epoch meets the unreadable rows, before and after the interruption."""
    damage(tmp_path, 2, 5, 11)
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
