"""A run goes on from its newest checkpoint. From an earlier one another run begins, and until it has a checkpoint of
its own it begins there again under ``--resume latest``, never from random weights."""

from __future__ import annotations

import os

import pytest
from same_runs import Killed, assert_same_weights, contents, killed

from clipup.train.checkpoints import open_clip_format, sharded

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])


def assert_is_rest_of(resumed, once):
    assert [record["step"] for record in resumed.history] == list(range(4, 10))
    assert_same_weights(once, resumed)


@KINDS
def test_an_earlier_checkpoint_is_refused_to_its_run_and_another_run_begins_from_it(run, monkeypatch, kind):
    once = run(fsdp_checkpoint=kind)
    before = contents(once.directory)
    start = str(once.directory / "checkpoints" / ("epoch_1.pt" if kind == "full" else "epoch_1"))

    with pytest.raises(FileExistsError, match="its run has gone on: epoch_.* at step 9"):
        run(fsdp_checkpoint=kind, resume=start)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(open_clip_format if kind == "full" else sharded, "write_pickle", killed)
        patched.chdir(once.directory)
        run(fsdp_checkpoint=kind, resume=os.path.relpath(start), name="other")
    with pytest.raises(FileExistsError, match="already holds a run.*--resume latest"):
        run(fsdp_checkpoint=kind, resume=start, name="other")

    assert_is_rest_of(run(fsdp_checkpoint=kind, resume="latest", name="other"), once)
    assert contents(once.directory) == before
    assert run(fsdp_checkpoint=kind, resume="latest", name="other").already_finished


@pytest.mark.parametrize(("deleted", "from_another"), [(0, True), (1, True), (1, False)])
def test_killed_while_it_discards_a_run_it_leaves_no_half_of_that(run, monkeypatch, deleted, from_another):
    once, former = run(), run(name="other", epochs=2)
    start = str(once.directory / "checkpoints" / "epoch_1.pt")
    delete, left = open_clip_format.delete, iter(range(deleted))

    def delete_some(path):
        if next(left, None) is None:
            raise Killed
        delete(path)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(open_clip_format, "delete", delete_some)
        run(name="other", force=True, resume=start if from_another else None)

    after = run(resume="latest", name="other", epochs=3 if deleted else 2)
    if not deleted:  # the former run is whole, and continued
        assert after.already_finished and after.steps == former.steps
    elif from_another:
        assert_is_rest_of(after, once)
    else:
        assert [record["step"] for record in after.history] == list(range(1, 10))


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    folder = run(save_frequency=2, epochs=3).directory / "checkpoints"  # keeps epoch 2

    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)

    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}
