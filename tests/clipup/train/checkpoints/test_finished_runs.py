"""Resuming runs that were finished, or were killed while finishing."""

from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from same_runs import Killed, assert_same_run, contents, killed

import clipup
from clipup.cli.runs import model_of, trained_steps
from clipup.train import Every, Trainer
from clipup.train.checkpoints.format import load

NOISY = clipup.MoEConfig.clip_up(num_experts=4, router_noise=1.0)


@pytest.fixture
def run(run, named_model):
    """A sparse run, three steps an epoch."""
    return partial(run, sparse=NOISY, model=named_model, lr_scheduler="const")


def test_resuming_a_finished_run_changes_nothing_and_it_can_still_be_extended_exactly(run):
    whole = run(steps=6, name="whole")
    first = run(steps=4)
    before = contents(first.directory)
    torch.rand(5)

    idle = run(callbacks=[Every(1, lambda model: {})], resume="latest", steps=4)

    assert contents(first.directory) == before
    assert idle.already_finished and not first.already_finished
    assert (idle.steps, idle.history, idle.evaluations) == (first.steps, first.history, first.evaluations)
    assert_same_run(first, idle)
    assert_same_run(run(steps=6, resume="latest"), whole)


@pytest.mark.parametrize("error", [Killed, OSError])
def test_a_run_that_ends_before_its_model_was_saved_is_finished_by_the_next(run, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch, pytest.raises(error, match="No space left"):
        patch.setattr("clipup.models.saving.save_with_tokenizer", full(error))
        run(steps=4, save_every_n_steps=4)
    state = load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")
    assert state["step"] == 4 and not state["finished"]
    torch.rand(5)

    finished = run(steps=4, save_every_n_steps=4, resume="latest")

    assert not finished.already_finished
    assert (finished.directory / "model" / "open_clip_model.safetensors").is_file()
    assert run(steps=4, resume="latest").already_finished


def test_a_run_killed_between_its_last_step_and_the_end_of_the_epoch_ends_that_epoch(run, monkeypatch):
    """The last step was saved; the epoch's checkpoint and its place in the count were not."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_end_epoch", killed)
        run(epochs=1, steps=None, save_every_n_steps=3)

    folder = run(epochs=1, steps=None, resume="latest").directory / "checkpoints"
    assert (folder / "epoch_1.pt").is_file()
    latest = load(folder / "epoch_latest.pt")
    assert (latest["epoch"], latest["step"], latest["step_of_epoch"]) == (1, 3, 0)


@pytest.mark.parametrize("place, every", [("_end_epoch", 5), ("_save_model", 0)])
def test_a_run_that_goes_on_after_its_end_stands_for_its_newest_checkpoint_and_not_for_its_former_model(
    run, monkeypatch, place, every
):
    directory = run(steps=3).directory
    former = weights_of(directory)
    assert former == weights_of(directory / "model") and trained_steps(directory) == 3

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, place, killed)
        run(steps=6, resume="latest", save_every_n_steps=every)

    latest = load(directory / "checkpoints" / "epoch_latest.pt")["state_dict"]
    assert weights_of(directory) == digest(latest) != former == weights_of(directory / "model_before")
    assert trained_steps(directory) is None
    with pytest.raises(FileNotFoundError):
        clipup.create_model_and_transforms(str(directory))

    run(steps=6, resume="latest")
    assert weights_of(directory) == weights_of(directory / "model") != former
    assert not (directory / "model_before").exists()


@pytest.mark.parametrize("write, kept", [("torch.save", "model"), ("safetensors.torch.save_file", "model_before")])
def test_a_full_disk_takes_no_finished_model(run, monkeypatch, write, kept):
    """It fills at the first new checkpoint, or at the new model."""
    directory = run(steps=3).directory
    former = weights_of(directory)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(write, full(OSError))
        run(steps=6, resume="latest", save_every_n_steps=5)

    assert weights_of(directory / kept) == former


@pytest.mark.parametrize("before", [0, 3])
def test_a_new_model_is_never_set_aside_as_the_former_one(run, monkeypatch, csv_data, tmp_path, before):
    """The disk fills at the card, which has the results of the new model."""
    changes, directory = {"steps": 6, "val_data": csv_data, "resume": "latest"}, tmp_path / "logs" / "run"
    former = weights_of(run(**{**changes, "steps": before}).directory) if before else None

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        for method in ("write_bytes", "write_text"):
            patch.setattr(Path, method, partialmethod(full_at_results, getattr(Path, method)))
        run(**changes)

    kept = directory / "model_before"
    assert weights_of(kept) == former if before else not kept.exists()
    assert weights_of(run(**changes).directory / "model") != former
    assert not kept.exists()


def full_at_results(path, write, data, **kwargs):
    if path.name == "README.md" and "text_to_image_R@1" in str(data):
        full(OSError)()
    return write(path, data, **kwargs)


def full(error):
    def write(*args, **kwargs):
        raise error(28, "No space left on device")

    return write


def weights_of(directory):
    with model_of(str(directory)) as name:
        return digest(clipup.create_model_and_transforms(name)[0].state_dict())


def digest(state):
    return {name: value.double().sum().item() for name, value in state.items() if value.is_floating_point()}
