"""A run that is begun from a checkpoint of another one and stopped before it has its own begins from there again under
``--resume latest``, and never from random weights."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from clipup.cli import main
from clipup.train.checkpoints import open_clip_format, sharded

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])
LATER = list(range(4, 10))


class Killed(BaseException):
    pass


@pytest.fixture
def first(run):
    """The run "run", and a checkpoint of it after the first of three epochs."""

    def first(kind="full"):
        once = run(fsdp_checkpoint=kind)
        return once, str(once.directory / "checkpoints" / ("epoch_1.pt" if kind == "full" else "epoch_1"))

    return first


def assert_is_rest_of(resumed, once):
    assert [record["step"] for record in resumed.history] == LATER
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@KINDS
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_stopped_while_it_saves_its_first_checkpoint_it_begins_there_again(run, first, monkeypatch, kind, error):
    once, start = first(kind)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(open_clip_format, "write_pickle", fail)
        patched.setattr(sharded, "write", fail)
        patched.chdir(once.directory)
        run(fsdp_checkpoint=kind, resume=os.path.relpath(start), name="other")

    with pytest.raises(FileExistsError, match="already holds a run.*--resume latest"):
        run(fsdp_checkpoint=kind, resume=start, name="other")
    assert_is_rest_of(run(fsdp_checkpoint=kind, resume="latest", name="other"), once)
    os.rename(start, f"{start}.away")  # from here on it has its own
    assert run(fsdp_checkpoint=kind, resume="latest", name="other").already_finished


@pytest.mark.parametrize("deleted", range(3))
@pytest.mark.parametrize("from_another", [True, False])
def test_killed_while_it_discards_a_run_it_leaves_no_half_of_that(run, first, monkeypatch, deleted, from_another):
    once, start = first()
    former = run(name="other", epochs=2, lr=5e-4)
    delete, left = open_clip_format.delete, iter(range(deleted))

    def delete_some(path):
        if next(left, None) is None:
            raise Killed
        delete(path)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(open_clip_format, "delete", delete_some)
        run(name="other", force=True, resume=start if from_another else None)

    if not deleted:  # the former run is whole, and continued
        after = run(resume="latest", name="other", epochs=2, lr=5e-4)
        assert after.already_finished and after.steps == former.steps
    elif from_another:
        assert_is_rest_of(run(resume="latest", name="other"), once)
    else:
        assert [record["step"] for record in run(resume="latest", name="other").history] == list(range(1, 10))


def test_the_command_line_discards_a_run_for_a_checkpoint_of_another_one(monkeypatch, capsys):
    seen = []

    def stop(options):
        seen.append(options)
        raise ValueError("not trained")

    monkeypatch.setattr("clipup.train.run.train", stop)
    command = ["train", "--model", "ViT-B-32", "--name", "b", "--force", "--resume"]

    assert main([*command, "latest"]) == 2
    assert "--force has no effect with --resume latest" in capsys.readouterr().err
    assert main([*command, "logs/a/checkpoints/epoch_1.pt"]) == 2
    assert [(one.force, one.resume) for one in seen] == [(True, "logs/a/checkpoints/epoch_1.pt")]
