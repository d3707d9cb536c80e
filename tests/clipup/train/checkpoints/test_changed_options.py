"""Resuming with other options, ranks or data: what takes effect, what is converted, and what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from same_runs import assert_same_run

import clipup
from clipup.train import train
from clipup.train.checkpoints.format import load


@pytest.fixture
def run(run):
    """Epochs of three steps, and a checkpoint at the end."""
    return partial(run, steps=6, save_frequency=0, save_most_recent=False)


def log(result):
    return (result.directory / "out.log").read_text()


def checkpoint(result, name="epoch_latest.pt"):
    return result.directory / "checkpoints" / name


def test_at_an_epochs_end_the_batch_size_may_change_and_the_epochs_are_those_asked_for(run, pairs):
    run(steps=None, epochs=1, lr_scheduler="const")
    changes = {"steps": None, "epochs": 2, "lr_scheduler": "const", "batch_size": 4, "resume": "latest"}

    halved = run(loader=pairs(batch_size=4), **changes)

    assert [record["epoch"] for record in halved.history] == [0] * 3 + [1] * 6
    state = load(checkpoint(halved))
    assert (state["epoch"], state["samples_seen"]) == (2, 2 * 24)
    assert "batch_size 64 -> 4" in log(halved) and "from step 3 to step 9" in log(halved)
    assert run(loader=pairs(batch_size=4), **{**changes, "epochs": 3}).steps == 3 + 2 * 6


@pytest.mark.parametrize("name", ["run", "other"])
def test_an_evaluation_on_other_data_is_not_taken_for_done(run, csv_data, tmp_path, name):
    latest = checkpoint(run(steps=1, val_data=csv_data))
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(Path(csv_data).read_text().splitlines(keepends=True)[:9]))
    torch.save({**load(latest), "finished": False}, latest)

    other = run(name=name, steps=1, resume="latest" if name == "run" else str(latest), val_data=str(fewer))

    assert json.loads((other.directory / "evaluations.jsonl").read_text().splitlines()[-1])["gallery"] == 8


def test_an_evaluation_at_another_capacity_is_not_taken_for_done(options, named_model, csv_data):
    def evaluations(eval_capacity_factor, **changes):
        cfg = clipup.MoEConfig.clip_up(eval_capacity_factor=eval_capacity_factor)
        settings = {"model": named_model, "moe": True, "moe_cfg": cfg, "train_data": csv_data, "val_data": csv_data}
        return train(options(**settings, batch_size=8, steps=1, workers=0, **changes))

    latest = checkpoint(evaluations(None))
    torch.save({**load(latest), "finished": False}, latest)

    assert len(evaluations(0.5, resume="latest", resume_with_changes=True).evaluations) == 2


@pytest.mark.parametrize("changes", [{}, {"lr": 1e-2}, {"batch_size": 4}])
def test_at_an_epochs_end_the_data_may_change_and_the_log_says_so(run, csv_data, changes):
    usual = {"train_data": csv_data, "batch_size": 8, "workers": 0, "steps": None, "lr_scheduler": "const"}
    run(epochs=1, **usual)
    assert "samples)" not in log(run(epochs=2, resume="latest", **usual))
    rows = Path(csv_data).read_text().splitlines(keepends=True)
    Path(csv_data).write_text("".join(rows[:17]))

    other = run(epochs=3, resume="latest", **{**usual, **changes})

    assert log(other).count("(24 -> 16 samples)") == 1


def test_learning_rate_decay_and_betas_take_effect_and_are_named(run):
    usual = {"lr_scheduler": "const", "skip_scheduler": True}
    usual["sparse"] = clipup.MoEConfig(num_experts=2)
    run(steps=3, moe_lr_scale=10.0, **usual)

    resumed = run(steps=4, moe_lr_scale=0.1, resume="latest", lr=1e-2, wd=0.5, beta1=0.5, eps=1e-3, **usual)

    groups = load(checkpoint(resumed))["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-2, 1e-2, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in groups] == [0, 0.5, 0, 0.5]
    assert all((group["betas"], group["eps"]) == ((0.5, 0.98), 1e-3) for group in groups)
    for text in ("lr 0.001 -> 0.01", "wd 0.2 -> 0.5", "beta1 None -> 0.5", "steps 3 -> 4"):
        assert text in log(resumed)
    assert "resumed with changed options: " in log(resumed)


@pytest.mark.parametrize(
    ("opt", "before", "after"),
    [
        ("adamw", {}, {"opt_kwargs": {"amsgrad": True}}),
        ("timm/rmsprop", {}, {"opt_kwargs": {"centered": True}}),
        ("timm/rmsproptf", {"momentum": 0.0}, {"momentum": 0.9}),
    ],
)
def test_an_optimizer_that_needs_more_state_than_the_checkpoint_has_is_refused_and_the_run_can_be_resumed(
    run, opt, before, after
):
    usual = {"opt": opt, "lr_scheduler": "const"}
    whole = run(name="whole", **usual, **before)
    run(steps=4, **usual, **before)

    with pytest.raises(ValueError, match="opt_kwargs.*momentum"):
        run(resume="latest", **usual, **after)

    assert_same_run(run(resume="latest", **usual, **before), whole)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"siglip": True}, "siglip"),
        ({"moe": True}, "moe False"),
        ({"opt": "nadamw"}, "opt 'adamw' -> 'nadamw'"),
        (
            {"force_image_size": 32, "force_context_length": 4, "force_quick_gelu": True, "force_custom_text": True},
            "force_image_size None -> 32, force_context_length .*, force_quick_gelu .*, force_custom_text False",
        ),
    ],
)
def test_options_that_identify_a_run_change_only_with_an_explicit_flag(run, changes, text):
    run(steps=3)

    with pytest.raises(ValueError, match=f"run with other options: {text}.*another --name.*--resume-with-changes"):
        run(steps=6, resume="latest", **changes)

    if "seed" in changes:
        resumed = run(steps=6, resume="latest", resume_with_changes=True, **changes)
        assert resumed.steps == 6 and "seed 0 -> 1" in log(resumed)
