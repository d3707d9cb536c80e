"""A run that is continued from one of its earlier checkpoints goes on from there, whatever it had done after it."""

from __future__ import annotations

import os
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
    assert {path.name for path in aside.iterdir()} - {"metrics.jsonl", "evaluations.jsonl"} == kept
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


def test_a_run_may_be_rewound_twice_and_resumed_from_what_was_set_aside(run):
    once = run()
    folder = once.directory / "checkpoints"
    run(resume=str(folder / "epoch_2.pt"), lr=1e-4)
    run(resume=str(folder / "epoch_1.pt"), lr=1e-5)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"before_rewind_1", "before_rewind_2"}
    assert load(folder / "before_rewind_2" / "epoch_2.pt")["step"] == 6
    again = run(resume=str(folder / "before_rewind_1" / "epoch_3.pt"), epochs=4)
    assert [record["step"] for record in again.history][-1] == 12


@KINDS
def test_the_newest_checkpoint_by_its_path_sets_nothing_aside(run, kind):
    once = run(fsdp_checkpoint=kind)
    last = once.directory / "checkpoints" / ("epoch_3.pt" if kind == "full" else "epoch_3")
    run(resume=str(last), epochs=4, fsdp_checkpoint=kind)
    assert not list(once.directory.glob("checkpoints/before*"))
