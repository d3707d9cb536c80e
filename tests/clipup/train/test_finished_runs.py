"""Resuming runs that were finished, or were killed while finishing."""

from __future__ import annotations

import pytest
import torch

import clipup
from clipup.train import Every, Trainer, train
from clipup.train.checkpoints import open_clip_format
from clipup.train.checkpoints.open_clip_format import load

NOISY = clipup.MoEConfig.clip_up(num_experts=4, router_noise=1.0)


@pytest.fixture
def run(make_model, pairs, options, named_model):
    """A sparse run of six steps, three an epoch."""

    def run(callbacks=(), **changes):
        usual = {"model": named_model, "lr_scheduler": "const"}
        return train(options(**usual, **changes), model=make_model(NOISY), loader=pairs(), callbacks=callbacks)

    return run


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("length", [{"steps": 4}, {"steps": None, "epochs": 2}], ids=["steps", "epochs"])
def test_resuming_a_finished_run_changes_nothing_and_says_so(run, length):
    first = run(**length)
    before = contents(first.directory)
    torch.rand(5)

    idle = run(callbacks=[Every(1, lambda model: {})], resume="latest", **length)

    assert contents(first.directory) == before
    assert idle.already_finished and not first.already_finished
    assert (idle.steps, idle.history, idle.evaluations) == (first.steps, first.history, first.evaluations)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, idle.model.state_dict()[name]), name


def test_a_finished_run_that_was_resumed_can_still_be_extended_exactly(run):
    whole = run(steps=8, name="whole")
    run(steps=4)
    torch.rand(5)
    run(steps=4, resume="latest")

    extended = run(steps=8, resume="latest")

    assert [record["loss"] for record in extended.history] == [record["loss"] for record in whole.history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, extended.model.state_dict()[name]), name


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_killed_between_the_two_names_of_a_checkpoint_ends_with_both(run, monkeypatch, epoch):
    class Killed(BaseException):
        pass

    link, links = open_clip_format.shutil.copyfile, []

    def kill(*paths):
        links.append(paths)
        if len(links) == epoch:
            raise Killed
        link(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(open_clip_format.shutil, "copyfile", kill)
        with pytest.raises(Killed):
            run(steps=6)

    finished = run(steps=6, resume="latest")

    names = ("epoch_1.pt", "epoch_2.pt", "epoch_latest.pt")
    kept = [load(finished.directory / "checkpoints" / name)["step"] for name in names]
    assert kept == [3, 6, 6]


def test_a_run_killed_before_its_model_was_saved_is_finished_by_the_next(run, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("clipup.models.saving.save_with_tokenizer", kill)
        with pytest.raises(Killed):
            run(steps=4, save_every_n_steps=4)
    torch.rand(5)

    finished = run(steps=4, save_every_n_steps=4, resume="latest")

    assert not finished.already_finished
    assert (finished.directory / "model" / "open_clip_model.safetensors").is_file()
    assert run(steps=4, resume="latest").already_finished
    whole = run(steps=8, name="whole")
    extended = run(steps=8, resume="latest")
    assert [record["loss"] for record in extended.history] == [record["loss"] for record in whole.history]


def test_a_full_disk_at_the_model_keeps_the_last_step(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipup.models.saving.save_with_tokenizer", full)

    with pytest.raises(OSError, match="No space left"):
        run(steps=5)

    state = load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")
    assert state["step"] == 5 and not state["finished"]


def test_a_run_killed_between_its_last_step_and_the_end_of_the_epoch_ends_that_epoch(
    make_model, pairs, options, monkeypatch
):
    """The last step was saved; the epoch's checkpoint and its place in the count were not."""

    def run(**changes):
        return train(options(epochs=2, steps=None, save_every_n_steps=3, **changes), model=make_model(), loader=pairs())

    end_epoch = Trainer._end_epoch

    def killed(trainer):
        if trainer.state.step == 6:
            raise SystemExit("killed")
        end_epoch(trainer)

    monkeypatch.setattr(Trainer, "_end_epoch", killed)
    with pytest.raises(SystemExit):
        run()
    monkeypatch.undo()
    folder = run(resume="latest").directory / "checkpoints"
    assert (folder / "epoch_2.pt").is_file()
    latest = load(folder / "epoch_latest.pt")
    assert (latest["epoch"], latest["step"], latest["step_of_epoch"]) == (2, 6, 0)
