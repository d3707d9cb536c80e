"""A run that was stopped and resumed equals the run that was not stopped."""

import os
import signal
from functools import partial

import pytest
import torch
from same_runs import assert_same_run, without_times

import clipup
from clipup.train import Every, TrainingInterrupted
from clipup.train.checkpoints.format import load

NOISY = clipup.MoEConfig.clip_up(num_experts=4, router_noise=1.0, selection_bias="sign")
SLOW = [pytest.param(source, marks=pytest.mark.slow) for source in ("csv", "webdataset")]


def damage(folder):
    """Three pictures that are missing or no pictures, and one in a shard whose bytes are not."""
    (folder / "2.png").unlink()
    for row in (5, 11):
        (folder / f"{row}.png").write_bytes(b"no picture")
    content = (folder / "train-0.tar").read_bytes()
    start = content.index(b"\x89PNG", content.index(b"4.png"))
    (folder / "train-0.tar").write_bytes(content[: start + 4] + bytes(30) + content[start + 34 :])


@pytest.mark.parametrize(
    "source", ["memory", "csv with workers", "cached csv", "streamed", "streamed by a worker", *SLOW]
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bitwise(source, run, csv_data, shards, tmp_path):
    """A sparse model with router noise, on pairs in memory or on files with random crops; some cannot be read,
    before and after the interruption."""
    damage(tmp_path)
    settings = {"train_data": csv_data, "workers": 2 * ("workers" in source), "cache_data": "cached" in source}
    if source == "webdataset" or "streamed" in source:
        settings = {"train_data": shards, "workers": int("worker" in source)}
    if "streamed" in source:
        settings |= {"train_data": f"file:{shards}", "train_num_samples": 24}
    if source == "memory":
        settings = {}
    run = partial(run, sparse=NOISY, steps=8, batch_size=8, max_skipped=0.2, **settings)
    whole = run(name="whole")
    with pytest.raises(TrainingInterrupted):  # the second step of the second of three epochs
        run(callbacks=[Every(5, lambda model: os.kill(os.getpid(), signal.SIGINT))])
    torch.rand(17)

    resumed = run(resume="latest")

    assert resumed.steps == 8
    assert resumed.skipped == whole.skipped == (0 if source == "memory" else 3 if "csv" in source else 1)
    assert_same_run(whole, resumed)


@pytest.fixture
def train_pairs(run):
    """Trains a sparse model with router noise on in-memory data, three steps an epoch."""
    return partial(run, sparse=NOISY, steps=6)


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
    first, second = theirs["optimizer"]["param_groups"]
    del first["param_names"], second["param_names"]
    torch.save(theirs, tmp_path / "theirs.pt")

    resumed = train_pairs(steps=None, epochs=2, resume=str(tmp_path / "theirs.pt"))

    assert without_times(resumed.history) == without_times(whole.history)[3:]
    second["params"].append(first["params"].pop())  # as open_clip_train 4 sorts them
    torch.save(theirs, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="groups of .* as pretrained"):
        train_pairs(name="other", steps=None, epochs=2, resume=str(tmp_path / "theirs.pt"))
