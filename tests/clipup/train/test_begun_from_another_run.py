"""A run that is begun from a checkpoint of another one and stopped before it has its own begins from there again: under
``--resume latest``, and by the same command. Never from random weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from clipup.cli import main
from clipup.train import Every, checkpoints, dcp_storage, run_directory

KINDS = pytest.mark.parametrize("kind", ["full", "sharded"])
LATER = list(range(4, 10))
INFINITE = '{"checkpoint": "x.pt", "step": Infinity}'


class Killed(BaseException):
    pass


@pytest.fixture
def first(run):
    """The run "run", and a checkpoint of it after the first of three epochs."""

    def first(kind="full"):
        once = run(fsdp_checkpoint=kind)
        return once, str(once.directory / "checkpoints" / ("epoch_1.pt" if kind == "full" else "epoch_1"))

    return first


@pytest.fixture
def save_breaks_off(monkeypatch):
    """The next checkpoint is not written: an error in its place."""

    def prepare(error):
        def fail(*args, **kwargs):
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(checkpoints, "write_pickle", fail)
        monkeypatch.setattr(dcp_storage, "save", fail)

    return prepare


def assert_is_rest_of(resumed, once):
    assert [record["step"] for record in resumed.history] == LATER
    for name, value in once.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@KINDS
@pytest.mark.parametrize("again", ["latest", "the same command"])
def test_killed_while_it_saves_its_first_checkpoint_it_begins_there_again(run, first, save_breaks_off, kind, again):
    once, start = first(kind)
    resume = "latest" if again == "latest" else start

    save_breaks_off(Killed())
    with pytest.raises(Killed):
        run(fsdp_checkpoint=kind, resume=start, name="other")
    save_breaks_off(Killed())
    with pytest.raises(Killed):
        run(fsdp_checkpoint=kind, resume=resume, name="other")

    resumed = run(fsdp_checkpoint=kind, resume=resume, name="other")

    assert_is_rest_of(resumed, once)
    assert ("has no checkpoint of its own yet" in (resumed.directory / "out.log").read_text()) == (again == "latest")


@KINDS
def test_its_first_checkpoint_is_whole_before_its_first_step(run, first, kind, tmp_path):
    _, start = first(kind)
    found = []

    def note(model):
        found.extend(checkpoints.candidates(tmp_path / "logs" / "other" / "checkpoints")[0])
        raise Killed

    with pytest.raises(Killed):
        run([Every(1, note)], fsdp_checkpoint=kind, resume=start, name="other")

    assert [path.name for path in found] == ["epoch_latest.pt" if kind == "full" else "step_3"]


@KINDS
def test_a_full_disk_at_its_first_checkpoint_costs_nothing(run, first, save_breaks_off, kind):
    once, start = first(kind)
    save_breaks_off(OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(OSError, match="No space left.*there is no earlier one.*continue with --resume latest"):
        run(fsdp_checkpoint=kind, resume=start, name="other")

    assert_is_rest_of(run(fsdp_checkpoint=kind, resume="latest", name="other"), once)


def test_what_it_began_from_is_needed_until_it_has_a_checkpoint(run, first, save_breaks_off):
    _, start = first()
    save_breaks_off(Killed())
    with pytest.raises(Killed):
        run(resume=start, name="other")
    os.rename(start, f"{start}.away")

    said = f"was begun from {start} and has no checkpoint of its own yet, and that cannot be used: there is no "
    with pytest.raises(FileNotFoundError, match=said):
        run(resume="latest", name="other")
    os.rename(f"{start}.away", start)
    run(resume="latest", name="other", epochs=2)
    os.rename(start, f"{start}.away")
    assert run(resume="latest", name="other").steps == 9


def test_where_it_began_does_not_depend_on_the_directory_of_the_process(run, first, save_breaks_off, monkeypatch):
    once, start = first()
    save_breaks_off(Killed())
    monkeypatch.chdir(once.directory)
    with pytest.raises(Killed):  # and the former directory again
        run(resume=os.path.relpath(start), name="other")

    assert_is_rest_of(run(resume="latest", name="other"), once)


def test_another_checkpoint_does_not_begin_it_again(run, first, save_breaks_off):
    once, start = first()
    save_breaks_off(Killed())
    with pytest.raises(Killed):
        run(resume=start, name="other")

    with pytest.raises(FileExistsError, match="already holds a run, and the checkpoint .*epoch_2.pt is of another one"):
        run(resume=start.replace("epoch_1", "epoch_2"), name="other")


@pytest.fixture
def killed_while_discarding(monkeypatch, run):
    """A run that is killed after so many parts of the former one were moved away."""

    def kill(renamed, **options):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "rename", _rename_some(renamed))
            run(force=True, **options)

    return kill


def _rename_some(left):
    rename, seen = Path.rename, []

    def renaming(path, target):
        if ".discarding.tmp" in str(target):
            seen.append(path)
            if len(seen) > left:
                raise Killed
        return rename(path, target)

    return renaming


@pytest.mark.parametrize("renamed", range(4))
@pytest.mark.parametrize("again", ["latest", "the same command"])
def test_killed_while_it_discards_a_run_it_begins_again(run, first, killed_while_discarding, renamed, again):
    once, start = first()
    former = run(name="other", epochs=2, lr=5e-4)

    killed_while_discarding(renamed, resume=start, name="other")
    if again == "the same command":
        assert_is_rest_of(run(resume=start, force=True, name="other"), once)
    elif renamed:
        assert_is_rest_of(run(resume="latest", name="other"), once)
    else:  # the former run is whole, and continued
        after = run(resume="latest", name="other", epochs=2, lr=5e-4)
        assert after.already_finished and after.steps == former.steps


@pytest.mark.parametrize("renamed", range(4))
@pytest.mark.parametrize("again", [{}, {"resume": "latest"}])
def test_a_run_that_was_restored_is_not_discarded_by_what_was_left_undone(run, killed_while_discarding, renamed, again):
    directory = run(epochs=2).directory
    (directory / "model").mkdir()
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    killed_while_discarding(renamed)
    shutil.copytree(copy, directory, dirs_exist_ok=True)

    if again:
        assert run(epochs=2, **again).already_finished
    else:
        with pytest.raises(FileExistsError, match="already holds a run"):
            run(epochs=2)

    left = {path.name for path in directory.iterdir()}
    assert left == {path.name for path in copy.iterdir()} and ".discarding.tmp" not in left
    assert held(directory) == held(copy)


def held(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_what_a_link_names_is_not_touched_by_what_was_left_undone(run, tmp_path):
    directory = run(epochs=2).directory
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "options.json").write_text("{}")
    (directory / ".discarding.tmp").symlink_to(elsewhere)

    assert run(epochs=2, resume="latest").already_finished
    assert run(epochs=1, force=True).steps == 3
    assert [path.name for path in elsewhere.iterdir()] == ["options.json"]
    assert (elsewhere / "options.json").read_text() == "{}"


def test_a_run_that_is_half_discarded_is_not_taken_for_the_one_it_was_begun_from(run, first, monkeypatch):
    once, start = first()
    run(resume=start, name="other", epochs=2)
    remove = run_directory.remove_directory

    def full(path):
        if path.name == ".discarding.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        remove(path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(run_directory, "remove_directory", full)
        run(name="other", force=True, resume=start)

    assert_is_rest_of(run(resume="latest", name="other"), once)


@KINDS
@pytest.mark.parametrize("again", ["latest", "the same command"])
def test_a_note_that_a_copy_brings_back_does_not_count_beside_its_checkpoints(run, first, save_breaks_off, kind, again):
    _, start = first(kind)
    save_breaks_off(Killed())
    with pytest.raises(Killed):
        run(fsdp_checkpoint=kind, resume=start, name="other")
    note = start.rpartition("/run/")[0] + "/other/begun_from.json"
    noted = Path(note).read_text()
    other = run(fsdp_checkpoint=kind, resume="latest", name="other")
    Path(note).write_text(noted)
    before = held(other.directory)

    if again == "latest":
        assert run(fsdp_checkpoint=kind, resume="latest", name="other").already_finished
    else:
        with pytest.raises(FileExistsError, match="already holds a run, and the checkpoint .* is of another one"):
            run(fsdp_checkpoint=kind, resume=start, name="other")
    assert held(other.directory) == before


def test_a_model_that_is_trained_is_not_discarded_for_a_note(run, first):
    _, start = first()
    other = run(resume=start, name="other")
    (other.directory / "model").mkdir()
    (other.directory / "checkpoints").rename(other.directory.parent / "moved")
    (other.directory / "begun_from.json").write_text(json.dumps({"checkpoint": start, "step": 3}))

    run(resume="latest", name="other", epochs=1)

    assert (other.directory / "model").exists()


@pytest.mark.parametrize("renamed", range(1, 4))
def test_nothing_of_a_run_that_was_discarded_is_left_beside_the_next_one(run, killed_while_discarding, renamed):
    directory = run(epochs=2).directory
    (directory / "model").mkdir()

    killed_while_discarding(renamed)
    result = run(resume="latest")

    assert [record["step"] for record in result.history] == list(range(1, 10))
    assert not (directory / "model").exists() and "step 6" not in (directory / "out.log").read_text().splitlines()[0]


def test_a_run_that_has_lost_its_checkpoints_is_not_begun_again_nor_discarded(run, first, tmp_path):
    _, start = first()
    other = run(resume=start, name="other")
    (other.directory / "model").mkdir()
    (other.directory / "checkpoints").rename(tmp_path / "moved")
    before = {path.name for path in other.directory.iterdir()}

    with pytest.raises(FileExistsError, match="already holds a run, and the checkpoint .* is of another one"):
        run(resume=start, name="other")
    assert {path.name for path in other.directory.iterdir()} == before

    again = run(resume="latest", name="other", epochs=1)
    assert again.steps == 3 and (other.directory / "model").exists()
    assert "yet: starts from the beginning" in (other.directory / "out.log").read_text()


def test_a_checkpoint_in_the_directory_of_a_run_that_has_not_begun_is_refused(run, first, tmp_path):
    _, start = first()
    (tmp_path / "logs" / "other").mkdir()
    inside = Path(start).rename(tmp_path / "logs" / "other" / "epoch_1.pt")

    with pytest.raises(FileExistsError, match="has another place or name than those of its run"):
        run(resume=str(inside), name="other")


def test_killed_while_its_model_is_built_it_begins_there_again(run, first, monkeypatch, make_model):
    once, start = first()

    def kill(*_):
        os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr("clipup.train.run.build_model", kill)
        run(resume=start, name="other")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    assert_is_rest_of(run(resume="latest", name="other"), once)


@pytest.fixture
def could_not_be_built(run, first, monkeypatch):
    """The whole run, and the first checkpoint of it, from which a run "other" was to begin."""

    def could_not_be_built(error):
        once, start = first()

        def fail(*_):
            raise error

        with monkeypatch.context() as patched, pytest.raises(type(error)):
            patched.setattr("clipup.train.run.build_model", fail)
            run(resume=start, name="other")
        return once, start

    return could_not_be_built


ERRORS = pytest.mark.parametrize(
    "error", [ValueError("no such model"), KeyboardInterrupt()], ids=["error", "interrupt"]
)


@ERRORS
def test_a_run_that_could_not_be_built_begins_there_once_it_can_be(run, could_not_be_built, error):
    once, start = could_not_be_built(error)
    os.rename(start, f"{start}.away")
    with pytest.raises(FileNotFoundError, match="Restore it"):
        run(resume="latest", name="other")
    os.rename(f"{start}.away", start)
    with pytest.raises(ValueError, match="Use the former values"):
        run(resume="latest", name="other", seed=1)

    assert_is_rest_of(run(resume="latest", name="other"), once)


@ERRORS
def test_a_run_that_could_not_be_built_leaves_its_name_free(run, could_not_be_built, error):
    could_not_be_built(error)

    assert run(name="other", epochs=1).steps == 3
    assert run(name="other", epochs=1, resume="latest").already_finished


def test_a_run_that_could_not_be_built_begins_where_was_asked_last(run, could_not_be_built, monkeypatch):
    _, start = could_not_be_built(KeyboardInterrupt())
    later = start.replace("epoch_1", "epoch_2")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("clipup.train.run.build_model", kill)
        run(resume=later, name="other")

    assert [record["step"] for record in run(resume="latest", name="other").history] == [7, 8, 9]


@pytest.mark.parametrize("note", ["{", "[]", "{}", '{"checkpoint": 1, "step": 3}', INFINITE, "\ud800"])
def test_a_damaged_note_names_what_starts_the_run_again(run, first, could_not_be_built, note):
    once, start = could_not_be_built(ValueError())
    path = once.directory.parent / "other" / "begun_from.json"
    path.write_text(note if note.startswith(("{", "[")) else json.dumps({"checkpoint": note, "step": 3}))

    for _ in range(2):
        with pytest.raises(ValueError, match="begin again with --force: from an?(other)? checkpoint"):
            run(resume="latest", name="other")
    assert_is_rest_of(run(resume=start, name="other", force=True), once)


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


def test_force_does_not_discard_a_run_that_is_continued(run, first):
    once, _ = first()

    with pytest.raises(
        ValueError, match="force discards the run in .*, and the checkpoint .* is its own; drop --force"
    ):
        run(resume=str(once.directory / "checkpoints" / "epoch_latest.pt"), force=True)


def test_a_stopped_run_names_the_command_that_continues_it(run, first):
    _, start = first()

    def interrupt(model):
        os.kill(os.getpid(), 15)

    with pytest.raises(
        KeyboardInterrupt, match=f"--name 'a b' --resume latest in place of --force and --resume {start}"
    ):
        run([Every(1, interrupt)], resume=start, force=True, name="a b")


@pytest.mark.parametrize("resume", ["logs/run", "logs/run/checkpoints"])
def test_a_directory_that_is_no_checkpoint_is_said_to_be_none(run, first, tmp_path, resume):
    first()

    with pytest.raises(ValueError, match="is a directory, and no sharded checkpoint"):
        run(resume=str(tmp_path / resume))
