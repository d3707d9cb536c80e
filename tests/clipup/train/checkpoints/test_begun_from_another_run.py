"""A run goes on from its newest checkpoint. From an earlier one another run begins, and until it has a checkpoint of
its own it begins there again under ``--resume latest``, never from random weights. One run writes at a time."""

import os

import pytest
from same_runs import Killed, assert_same_weights, contents, killed

from clipup.locks import DirectoryInUse
from clipup.train import Every
from clipup.train.checkpoints import file, kept, sharded

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])


@KINDS
def test_an_earlier_checkpoint_is_refused_to_its_run_and_another_run_begins_from_it(run, monkeypatch, kind):
    once = run(fsdp_checkpoint=kind)
    before = contents(once.directory)
    start = str(once.directory / "checkpoints" / ("epoch_1.pt" if kind == "full" else "epoch_1"))

    with pytest.raises(FileExistsError, match="its run has gone on: epoch_.* at step 9"):
        run(fsdp_checkpoint=kind, resume=start)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(file if kind == "full" else sharded, "write_pickle", killed)
        patched.chdir(once.directory)
        run(fsdp_checkpoint=kind, resume=os.path.relpath(start), name="other")
    with pytest.raises(FileExistsError, match="already holds a run.*--resume latest"):
        run(fsdp_checkpoint=kind, resume=start, name="other")

    resumed = run(fsdp_checkpoint=kind, resume="latest", name="other")
    assert [record["step"] for record in resumed.history] == list(range(4, 10))
    assert_same_weights(once, resumed)
    assert contents(once.directory) == before
    assert run(fsdp_checkpoint=kind, resume="latest", name="other").already_finished
    finished = str(kept.newest(once.directory / "checkpoints").path)
    assert not run(fsdp_checkpoint=kind, resume=finished, name="third").already_finished


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    folder = run(save_frequency=2, epochs=3).directory / "checkpoints"  # keeps epoch 2

    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)

    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}


@pytest.mark.parametrize("changes", [{"resume": "latest"}, {"force": True}], ids=str)
def test_a_run_in_use_is_refused_and_nothing_changes(run, tmp_path, changes):
    def second(model):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DirectoryInUse, match=r"run is in use by process .*--name"):
            run(**changes)
        assert sorted(tmp_path.rglob("*")) == before

    assert run([Every(3, second)], epochs=1).steps == 3
