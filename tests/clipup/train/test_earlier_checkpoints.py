"""A run goes on from its newest checkpoint; from an earlier one another run does, so that nothing is written over."""

from __future__ import annotations

import shutil

import pytest
import torch

from clipup.train import Every
from clipup.train.checkpoints import load

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


@KINDS
def test_another_run_that_dies_before_its_first_step_is_continued_from_where_it_began(run, kind):
    once = run(fsdp_checkpoint=kind)
    first = str(of_epoch(once.directory, 1, kind))

    class Killed(BaseException):
        pass

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        run([Every(1, kill)], fsdp_checkpoint=kind, resume=first, name="other")
    with pytest.raises(FileExistsError, match="already holds a run, and .*there with --resume latest"):
        run(fsdp_checkpoint=kind, resume=first, name="other")
    resumed = run(fsdp_checkpoint=kind, resume="latest", name="other")

    assert [record["step"] for record in resumed.history] == list(range(4, 10))
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_force_discards_a_run_for_one_from_a_checkpoint_of_another_run(run):
    first = str(of_epoch(run().directory, 1, "full"))
    run(name="other", epochs=2)

    assert [record["step"] for record in run(resume=first, name="other", force=True).history] == list(range(4, 10))
    with pytest.raises(FileExistsError, match="its run has gone on"):
        run(resume=first, force=True)


@KINDS
def test_the_newest_checkpoint_may_be_named_by_its_path(run, kind):
    directory = run(fsdp_checkpoint=kind).directory

    resumed = run(fsdp_checkpoint=kind, resume=str(of_epoch(directory, 3, kind)), epochs=4)

    assert resumed.steps == 12


def test_checkpoints_that_are_damaged_throughout_do_not_come_after_another_one(run):
    directory = run().directory
    for name in ("epoch_3.pt", "epoch_latest.pt"):
        (directory / "checkpoints" / name).write_bytes(b"damaged")

    resumed = run(resume=str(of_epoch(directory, 2, "full")))

    assert [record["step"] for record in resumed.history] == list(range(1, 10))


def test_the_way_out_of_a_checkpoint_with_nan_is_the_one_that_is_said(run):
    directory = run().directory
    for name in ("epoch_3.pt", "epoch_latest.pt"):
        state = load(directory / "checkpoints" / name)
        state["state_dict"]["logit_scale"].fill_(torch.nan)
        torch.save(state, directory / "checkpoints" / name)

    with pytest.raises(ValueError, match="not finite, in logit_scale; --resume latest takes an earlier one"):
        run(resume=str(of_epoch(directory, 3, "full")))
    with pytest.raises(FileExistsError, match="--resume latest, which passes over damaged checkpoints"):
        run(resume=str(of_epoch(directory, 2, "full")))
    resumed = run(resume="latest", epochs=4)

    assert "from step 6 to step 12" in (directory / "out.log").read_text() and resumed.steps == 12


@KINDS
def test_a_later_checkpoint_on_a_disk_that_is_away_is_neither_passed_over_nor_replaced(run, kind, tmp_path):
    directory = run(fsdp_checkpoint=kind, save_most_recent=False).directory
    last, away = of_epoch(directory, 3, kind), tmp_path / "away"
    if kind == "full":
        (directory / "checkpoints" / "epoch_latest.pt").unlink()
    last.rename(away)
    last.symlink_to(tmp_path / "nowhere")

    for resume in (str(of_epoch(directory, 2, kind)), "latest"):
        with pytest.raises(FileNotFoundError, match="could not be read.*It may be intact"):
            run(fsdp_checkpoint=kind, resume=resume)

    assert last.is_symlink()


@pytest.mark.parametrize("name", ["best.pt", "step_9", "epoch_3"])
def test_a_checkpoint_under_a_name_that_a_run_does_not_find_again_is_continued_as_another_run(run, name):
    directory = run().directory
    copy = shutil.copy(of_epoch(directory, 3, "full"), directory / "checkpoints" / name)

    with pytest.raises(FileExistsError, match=f"{name} has another place or name than those .*another --name"):
        run(resume=str(copy), epochs=4)

    assert run(resume=str(copy), epochs=4, name="other").steps == 12


@pytest.mark.parametrize("name", ["run/epoch_3.pt", "run/checkpoints/epoch_9.pt", "rum/checkpoints/epoch_3.pt"])
def test_a_checkpoint_that_is_not_there_is_named(run, name):
    path = run().directory.parent / name

    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint .*{name}"):
        run(resume=str(path))


def test_a_kept_checkpoint_is_not_deleted_for_one_that_was_not_kept(run):
    once = run(save_frequency=2, epochs=3)  # keeps epoch 2
    folder = once.directory / "checkpoints"

    run(resume="latest", epochs=4, save_frequency=1, delete_previous_checkpoint=True)

    assert {path.name for path in folder.iterdir()} == {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}
