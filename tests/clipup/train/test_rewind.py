"""A run that is continued from one of its earlier checkpoints goes on from there, whatever it had done after it."""

from __future__ import annotations

import errno
import os
import shutil
import signal

import pytest
import torch

from clipup.train import Every, TrainingInterrupted, train
from clipup.train.checkpoints import load, newest

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])


@pytest.fixture
def run(make_model, pairs, options):
    """Three epochs of three steps each."""

    def run(callbacks=(), **changes):
        settings = {"steps": None, "epochs": 3, **changes}
        return train(options(**settings), model=make_model(), loader=pairs(), callbacks=callbacks)

    return run


def tree(directory):
    """What a directory holds, without the log in words and the options of the last attempt."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in ("out.log", "options.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def first_epoch(directory, kind):
    return str(directory / "checkpoints" / ("epoch_1.pt" if kind == "full" else "epoch_1"))


@KINDS
def test_latest_is_of_what_was_trained_last(run, kind):
    changes = {"fsdp_checkpoint": kind}
    once = run(**changes)
    first, folder = first_epoch(once.directory, kind), once.directory / "checkpoints"
    kept = {path.name for path in folder.iterdir()} - {"epoch_1.pt", "epoch_1", "latest.json"}
    stop = Every(5, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="stopped after step 5 of 9"):
        run(resume=first, lr=1e-4, callbacks=[stop], **changes)
    assert newest(folder).state["step"] == 5
    resumed = run(resume="latest", lr=1e-4, **changes)
    unstopped = run(name="other", resume=first, lr=1e-4, **changes)
    for name, value in unstopped.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert [record["step"] for record in resumed.history] == list(range(1, 10))
    aside = folder / "before_rewind_1"
    assert {path.name for path in aside.iterdir()} - {"metrics.jsonl", "evaluations.jsonl", "latest.json"} == kept
    assert load(aside / ("epoch_3.pt" if kind == "full" else "epoch_3"))["step"] == 9
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 9
    assert "what came after it" in (once.directory / "out.log").read_text()


@KINDS
def test_a_rewound_run_that_is_killed_before_it_saves_is_continued_from_where_it_was_rewound_to(run, kind):
    changes = {"fsdp_checkpoint": kind}
    once = run(**changes)

    class Killed(BaseException):
        pass

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        run(resume=first_epoch(once.directory, kind), callbacks=[Every(1, kill)], **changes)
    assert newest(once.directory / "checkpoints").state["step"] == 3
    assert [record["step"] for record in run(resume="latest", **changes).history] == list(range(1, 10))


def test_a_run_may_be_rewound_twice(run):
    once = run()
    folder = once.directory / "checkpoints"
    run(resume=str(folder / "epoch_2.pt"), lr=1e-4)
    run(resume=str(folder / "epoch_1.pt"), lr=1e-5)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"before_rewind_1", "before_rewind_2"}
    assert load(folder / "before_rewind_2" / "epoch_2.pt")["step"] == 6
    assert load(folder / "epoch_3.pt")["rewinds"] == 2


@KINDS
def test_what_was_set_aside_is_continued_under_another_name(run, kind):
    changes = {"fsdp_checkpoint": kind}
    once = run(**changes)
    folder = once.directory / "checkpoints"
    run(resume=first_epoch(once.directory, kind), lr=1e-4, **changes)
    before = tree(once.directory)
    aside = str(folder / "before_rewind_1" / ("epoch_3.pt" if kind == "full" else "epoch_3"))
    with pytest.raises(FileExistsError, match="is not among those of its run, in .*; choose another --name"):
        run(resume=aside, epochs=4, **changes)
    assert tree(once.directory) == before
    again = run(resume=aside, name="again", epochs=4, **changes)
    assert again.steps == 12 and [record["step"] for record in again.history] == [10, 11, 12]


@KINDS
def test_a_run_that_fails_before_its_first_step_has_not_gone_back(run, kind, options, make_model):
    changes = {"fsdp_checkpoint": kind}
    once = run(**changes)
    before = tree(once.directory)

    class NoData:
        def __len__(self):
            return 3

        def __iter__(self):
            raise OSError("the file system does not answer")

    resumed = options(resume=first_epoch(once.directory, kind), steps=None, epochs=3, **changes)
    with pytest.raises(OSError, match="does not answer"):
        train(resumed, model=make_model(), loader=NoData())
    assert tree(once.directory) == before
    assert "is back in its place" in (once.directory / "out.log").read_text()
    assert run(resume="latest", **changes).already_finished


def test_records_are_kept_where_the_run_could_not_go_back(run, monkeypatch):
    once = run()
    before = tree(once.directory)
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(resume=first_epoch(once.directory, "full"))
    assert tree(once.directory) == before


def test_the_model_belongs_to_what_was_set_aside(options, named_model, pairs):
    settings = {"model": named_model, "steps": None}
    once = train(options(epochs=2, **settings), loader=pairs())
    trained = (once.directory / "model" / "open_clip_model.safetensors").read_bytes()
    stop = Every(4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    resumed = options(resume=first_epoch(once.directory, "full"), epochs=2, lr=1e-4, **settings)
    with pytest.raises(TrainingInterrupted):
        train(resumed, loader=pairs(), callbacks=[stop])
    assert not (once.directory / "model").exists()
    aside = once.directory / "checkpoints" / "before_rewind_1" / "model"
    assert (aside / "open_clip_model.safetensors").read_bytes() == trained


@KINDS
def test_a_copy_that_keeps_what_was_moved_is_continued_on_the_newest_branch(run, kind, tmp_path):
    changes = {"fsdp_checkpoint": kind, "remote_sync": str(tmp_path / "copies"), "remote_sync_protocol": "fsspec"}
    once = run(**changes)
    stop = Every(5, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted):
        run(resume=first_epoch(once.directory, kind), lr=1e-4, callbacks=[stop], **changes)
    copy = tmp_path / "copies" / once.directory.name / "checkpoints"
    assert (copy / ("epoch_3.pt" if kind == "full" else "epoch_3")).exists()  # a copy deletes nothing
    assert newest(copy).state["step"] == 5


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    once = run(save_frequency=2, epochs=3)  # keeps epoch 2
    folder = once.directory / "checkpoints"
    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)
    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}


@KINDS
def test_the_newest_checkpoint_by_its_path_sets_nothing_aside(run, kind):
    once = run(fsdp_checkpoint=kind)
    last = once.directory / "checkpoints" / ("epoch_3.pt" if kind == "full" else "epoch_3")
    run(resume=str(last), epochs=4, fsdp_checkpoint=kind)
    assert not list(once.directory.glob("checkpoints/before*"))
