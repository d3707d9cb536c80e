"""A run goes on from its newest checkpoint; from an earlier one another run does, so that nothing is written over."""

from __future__ import annotations

import pytest
import torch

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])


def tree(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def of_epoch(directory, epoch, kind):
    return directory / "checkpoints" / (f"epoch_{epoch}.pt" if kind == "full" else f"epoch_{epoch}")


@KINDS
@pytest.mark.parametrize("changes", [{}, {"epochs": 1}, {"delete_previous_checkpoint": True}], ids=str)
def test_an_earlier_checkpoint_of_the_run_is_refused_and_nothing_changes(run, kind, changes):
    directory = run(fsdp_checkpoint=kind).directory
    before = tree(directory)
    refused = (
        r"epoch_1(\.pt)? was written at step 3, and its run has gone on: epoch_(latest\.pt|3) was written at step 9. "
        r"Continue the run with --resume latest, .*, or choose another --name to train on from epoch_1(\.pt)?"
    )

    with pytest.raises(FileExistsError, match=refused):
        run(fsdp_checkpoint=kind, resume=str(of_epoch(directory, 1, kind)), **changes)

    assert tree(directory) == before
    assert run(fsdp_checkpoint=kind, resume="latest").already_finished


@KINDS
def test_another_run_goes_on_from_an_earlier_checkpoint_as_the_first_one_did(run, kind):
    once = run(fsdp_checkpoint=kind)
    before = tree(once.directory)

    other = run(fsdp_checkpoint=kind, resume=str(of_epoch(once.directory, 1, kind)), name="other")

    assert tree(once.directory) == before
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert [record["step"] for record in other.history] == list(range(4, 10))
    assert run(fsdp_checkpoint=kind, resume="latest", name="other").already_finished


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    once = run(save_frequency=2, epochs=3)  # keeps epoch 2
    folder = once.directory / "checkpoints"

    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)

    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}
