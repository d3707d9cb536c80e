"""Resuming with other options, ranks or data: what takes effect, what is converted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clipup.train import train
from clipup.train.checkpoints.open_clip_format import load


@pytest.fixture
def run(make_model, pairs, options):
    """Epochs of three steps, and a checkpoint at the end."""

    def run(loader=None, **changes):
        files = {"save_frequency": 0, "save_most_recent": False}
        data = loader or pairs()
        return train(options(**{**files, **changes}), model=make_model(), loader=data)

    return run


def log(result):
    return (result.directory / "out.log").read_text()


def checkpoint(result, name="epoch_latest.pt"):
    return result.directory / "checkpoints" / name


def test_streamed_shards_within_an_epoch_need_as_many_workers_as_before(make_model, options, shards):
    def run(**changes):
        return train(
            options(train_data=f"file:{shards}", train_num_samples=24, batch_size=8, **changes),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=True),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
        )

    run(steps=2, workers=1)

    with pytest.raises(ValueError, match="with workers 1 -> 2 the rest of the epoch"):
        run(steps=4, workers=2, resume="latest")


def test_at_an_epochs_end_the_batch_size_may_change_and_the_epochs_are_those_asked_for(run, pairs):
    run(steps=None, epochs=1, lr_scheduler="const")
    changes = {"steps": None, "epochs": 2, "lr_scheduler": "const", "batch_size": 4, "resume": "latest"}

    halved = run(loader=pairs(batch_size=4), **changes)

    assert [record["epoch"] for record in halved.history] == [0] * 3 + [1] * 6
    state = load(checkpoint(halved))
    assert (state["epoch"], state["samples_seen"]) == (2, 2 * 24)
    assert "batch_size 64 -> 4" in log(halved)
    assert run(loader=pairs(batch_size=4), **{**changes, "epochs": 3}).steps == 3 + 2 * 6


@pytest.mark.parametrize("name", ["run", "other"])
def test_an_evaluation_on_other_data_is_not_taken_for_done(make_model, pairs, options, csv_data, tmp_path, name):
    def run(**changes):
        return train(
            options(**{"steps": 1, "val_data": csv_data, **changes}),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=False),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
            loader=pairs(),
        )

    latest = checkpoint(run())
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(Path(csv_data).read_text().splitlines(keepends=True)[:9]))
    torch.save({**load(latest), "finished": False}, latest)

    other = run(name=name, resume="latest" if name == "run" else str(latest), val_data=str(fewer))

    assert json.loads((other.directory / "evaluations.jsonl").read_text().splitlines()[-1])["gallery"] == 8


def test_learning_rate_decay_and_betas_take_effect_and_are_named(run):
    usual = {"lr_scheduler": "const", "skip_scheduler": True}
    run(steps=3, **usual)

    resumed = run(steps=4, resume="latest", lr=1e-2, wd=0.5, beta1=0.5, eps=1e-3, **usual)

    group = load(checkpoint(resumed))["optimizer"]["param_groups"][1]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-2, 0.5, (0.5, 0.98), 1e-3)
    assert load(checkpoint(resumed))["optimizer"]["param_groups"][0]["weight_decay"] == 0
    for text in ("lr 0.001 -> 0.01", "wd 0.2 -> 0.5", "beta1 None -> 0.5", "steps 3 -> 4"):
        assert text in log(resumed)
    assert "resumed with changes, which take effect from now on: " in log(resumed)
    assert resumed.history[-1]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("changes", "text"), [({"seed": 1}, "seed 0 -> 1"), ({"siglip": True}, "siglip"), ({"moe": True}, "moe False")]
)
def test_options_that_identify_a_run_change_only_with_an_explicit_flag(run, changes, text):
    first = run(steps=3)
    before = checkpoint(first).read_bytes()

    with pytest.raises(ValueError, match=f"run with other options: {text}.*another --name.*--resume-with-changes"):
        run(steps=6, resume="latest", **changes)

    assert checkpoint(first).read_bytes() == before
    if "seed" in changes:
        resumed = run(steps=6, resume="latest", resume_with_changes=True, **changes)
        assert resumed.steps == 6 and "seed 0 -> 1" in log(resumed)
