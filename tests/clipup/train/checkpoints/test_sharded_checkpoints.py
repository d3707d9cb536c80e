"""Sharded checkpoints of one process: when they are written, which are kept, and what continues from them."""

import os
import signal
import threading
from functools import partial

import pytest
import torch
from same_runs import assert_same_run

from clipup.train import Every, TrainingInterrupted
from clipup.train.checkpoints import kept, sharded
from clipup.train.checkpoints.format import load

FULL = {"fsdp_checkpoint": "full", "save_every_n_steps": 0}
DELETING = {**FULL, "delete_previous_checkpoint": True}


@pytest.fixture
def run(run):
    """Three steps an epoch."""
    return partial(run, steps=6, fsdp_checkpoint="sharded", lr_scheduler="const")


def newest(result):
    return kept.newest(result.directory / "checkpoints").path


@pytest.mark.parametrize(
    ("opt", "precision"),
    [("adamw", "fp32"), ("nadamw", "bf16"), ("timm/lamb", "fp32")]
    + [pytest.param("timm/laprop", "fp32", marks=pytest.mark.slow)],
)
def test_both_kinds_continue_each_other_bitwise_and_hold_the_same(run, opt, precision):
    """NAdam and timm's optimizers hold numbers by parameter, or counts of steps in their groups."""
    run = partial(run, precision=precision)
    whole = run(name="whole", opt=opt)

    for steps, kind in enumerate(("sharded", "full", "sharded", "sharded"), 3):
        resumed = run(steps=steps, opt=opt, fsdp_checkpoint=kind, resume="latest")

    assert_same_run(whole, resumed)
    found, full = (load(resumed.directory / "checkpoints" / name) for name in ("epoch_2", "epoch_latest.pt"))
    expected = load(whole.directory / "checkpoints" / "epoch_2")["optimizer"]["state"]
    torch.testing.assert_close(found["optimizer"]["state"], expected, rtol=0, atol=0)
    assert set(found) == set(full) and set(found["state_dict"]) == set(full["state_dict"])
    assert len(found["optimizer"]["state"]) == len(full["optimizer"]["state"])
    assert found["step"] == 6 and found["finished"]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(run, monkeypatch):
    trained_on, writing, most = threading.Event(), [], []
    save = sharded.write

    def slow(tensors, directory, *arguments):
        writing.append(directory)
        most.append(len(writing))
        in_time = trained_on.wait(20)
        writing.remove(directory)
        assert in_time, "training waited"
        save(tensors, directory, *arguments)

    monkeypatch.setattr(sharded, "write", slow)
    step = iter(range(1, 7))
    result = run([Every(1, lambda model: trained_on.set() if next(step) == 3 else None)], save_every_n_steps=2)

    assert result.steps == 6 and set(most) == {1}
    assert load(newest(result))["step"] == 6


def test_ctrl_c_waits_for_the_checkpoint_that_it_names(run, monkeypatch):
    save = sharded.write
    monkeypatch.setattr(sharded, "write", lambda *a: (threading.Event().wait(0.3), save(*a))[1])

    with pytest.raises(TrainingInterrupted) as stopped:
        run([Every(2, lambda model: os.kill(os.getpid(), signal.SIGINT))])

    assert stopped.value.checkpoint.name == "step_2"
    assert load(stopped.value.checkpoint)["step"] == 2


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (
            FULL,
            ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"],
        ),
        ({**FULL, "save_frequency": 0}, ["epoch_latest.pt"]),
        ({**DELETING, "save_frequency": 2}, ["epoch_2.pt", "epoch_latest.pt"]),
        ({**DELETING, "save_most_recent": False}, ["epoch_3.pt", "epoch_latest.pt"]),
        ({}, ["epoch_1", "epoch_2", "epoch_3"]),
        ({"save_total_limit": 3}, ["epoch_2", "epoch_3", "step_8"]),
        ({"save_frequency": 0}, ["step_9"]),
        ({"delete_previous_checkpoint": True, "save_every_n_steps": 0}, ["epoch_3"]),
        ({"save_total_limit": 2, "fsdp_checkpoint": "full"}, ["epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"]),
    ],
)
def test_so_many_checkpoints_are_kept(run, changes, kept):
    folder = run(**{"steps": 9, "save_every_n_steps": 2, **changes}).directory / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == kept
