"""A run goes on from its newest checkpoint; from an earlier one another run does, so that nothing is written over."""

from __future__ import annotations

import shutil

import pytest
import torch

from clipup.train import train
from clipup.train.checkpoints import load

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])


@pytest.fixture
def run(make_model, pairs, options):
    """Three epochs of three steps each."""

    def run(**changes):
        settings = {"steps": None, "epochs": 3, **changes}
        return train(options(**settings), model=make_model(), loader=pairs())

    return run


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
        r"epoch_1(\.pt)? is after step 3, and its run has gone on: epoch_(latest\.pt|3) is after step 9. Continue the "
        r"run with --resume latest; train on from epoch_1(\.pt)? with another --name; or move what comes after it "
        r"elsewhere first: epoch_2(\.pt)?, epoch_3(\.pt)?"
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


@KINDS
def test_a_run_goes_on_from_an_earlier_checkpoint_once_the_later_ones_are_elsewhere(run, kind, tmp_path):
    directory = run(fsdp_checkpoint=kind).directory
    for path in (directory / "checkpoints").iterdir():
        if path != of_epoch(directory, 1, kind):
            shutil.move(path, tmp_path)

    resumed = run(fsdp_checkpoint=kind, resume=str(of_epoch(directory, 1, kind)))

    assert [record["step"] for record in resumed.history] == list(range(1, 10))
    assert load(of_epoch(directory, 3, kind))["step"] == 9


@KINDS
def test_the_newest_checkpoint_may_be_named_by_its_path(run, kind):
    directory = run(fsdp_checkpoint=kind).directory

    resumed = run(fsdp_checkpoint=kind, resume=str(of_epoch(directory, 3, kind)), epochs=4)

    assert resumed.steps == 12


def test_damaged_checkpoints_do_not_come_after_another_one(run):
    directory = run().directory
    for name in ("epoch_3.pt", "epoch_latest.pt"):
        (directory / "checkpoints" / name).write_bytes(b"damaged")

    resumed = run(resume=str(of_epoch(directory, 2, "full")))

    assert [record["step"] for record in resumed.history] == list(range(1, 10))


def test_a_checkpoint_under_a_name_that_a_run_does_not_find_again_is_continued_as_another_run(run):
    directory = run().directory
    best = shutil.copy(of_epoch(directory, 3, "full"), directory / "checkpoints" / "best.pt")

    with pytest.raises(FileExistsError, match=r"best.pt has another place or name than those .*another --name"):
        run(resume=str(best), epochs=4)

    assert run(resume=str(best), epochs=4, name="other").steps == 12


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    once = run(save_frequency=2, epochs=3)  # keeps epoch 2
    folder = once.directory / "checkpoints"

    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)

    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}
