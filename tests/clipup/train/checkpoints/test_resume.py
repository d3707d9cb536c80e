"""A run that was stopped and resumed equals the run that was not stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal

import open_clip
import pytest
import torch

import clipup
from clipup.train import Every, TrainingInterrupted, train
from clipup.train.checkpoints.open_clip_format import load

NOISY = clipup.MoEConfig.clip_up(num_experts=4, router_noise=1.0, selection_bias="sign")
TIMES = ("seconds", "images_per_second", "batch_time", "data_time", "step_time")


def stop_in(step: int) -> Every:
    """Sends the process a signal in step ``step``."""
    calls = []

    def send(model):
        calls.append(model)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Every(1, send)


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same_run(one, other):
    assert without_times(one.history) == without_times(other.history)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.fixture(params=["memory", "csv with workers", "cached csv", "streamed"])
def run(request, make_model, pairs, options, csv_data, shards):
    """Trains a sparse model with router noise on in-memory data, or on files with random crops."""
    source = request.param
    preprocess = open_clip.image_transform(16, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)

    def run(callbacks=(), **changes):
        settings = {"steps": 8, "batch_size": 8, **changes}
        if source == "memory":
            return train(options(**settings), model=make_model(NOISY), loader=pairs(), callbacks=callbacks)
        settings |= {"workers": 2 * ("workers" in source), "cache_data": "cached" in source}
        data = {"train_data": csv_data}
        if source == "streamed":
            data = {"train_data": f"file:{shards}", "train_num_samples": 24}
        return train(
            options(**data, **settings),
            model=make_model(NOISY),
            preprocess=preprocess,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )

    return run


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bitwise(run):
    whole = run(name="whole")
    with pytest.raises(TrainingInterrupted):
        run(callbacks=[stop_in(5)])  # the second step of the second of three epochs
    torch.rand(17)

    resumed = run(resume="latest")

    assert resumed.steps == 8
    assert_same_run(whole, resumed)


@pytest.fixture
def train_pairs(make_model, pairs, options):
    """Trains a sparse model with router noise on in-memory data, three steps an epoch."""

    def run(callbacks=(), **changes):
        return train(options(**changes), model=make_model(NOISY), loader=pairs(), callbacks=callbacks)

    return run


def test_the_newest_checkpoint_is_the_one_with_the_most_steps_and_later_records_go(train_pairs):
    whole = train_pairs(steps=None, epochs=2)
    folder = whole.directory / "checkpoints"
    (folder / "epoch_latest.pt").unlink()
    (folder / "epoch_2.pt").unlink()
    shutil.copy(folder / "epoch_1.pt", folder / "epoch_3.pt")
    with open(whole.directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "cut o')

    resumed = train_pairs(steps=None, epochs=2, resume="latest")

    lines = (whole.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert_same_run(whole, resumed)


def test_a_half_precision_run_resumes_its_gradient_scaler(train_pairs):
    half = {"precision": "amp", "lr_scheduler": "const"}
    train_pairs(**half, steps=3)

    resumed = train_pairs(**half, steps=5, resume="latest")

    whole = train_pairs(**half, steps=5, name="whole")
    scalers = [load(run.directory / "checkpoints" / "epoch_latest.pt")["scaler"] for run in (resumed, whole)]
    assert scalers[0] == scalers[1] != torch.amp.GradScaler("cpu").state_dict()
    assert_same_run(whole, resumed)


def test_a_checkpoint_of_open_clip_train_resumes(make_model, pairs, options, train_pairs, tmp_path):
    whole = train_pairs(name="whole", steps=None, epochs=2)
    ours = load(whole.directory / "checkpoints" / "epoch_1.pt")
    theirs = {key: ours[key] for key in ("epoch", "name", "optimizer")}
    theirs["state_dict"] = {f"module.{name}": value for name, value in ours["state_dict"].items()}
    torch.save(theirs, tmp_path / "theirs.pt")

    resumed = train_pairs(steps=None, epochs=2, resume=str(tmp_path / "theirs.pt"))

    assert without_times(resumed.history) == without_times(whole.history)[3:]
