"""Sharded checkpoints of one process: when they are written, which are kept and used, and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading

import pytest
import torch
from strangers import MakesFile

import clipup
from clipup.cli import main
from clipup.moe.config import MoEConfig
from clipup.train import Every, TrainingInterrupted, train
from clipup.train.checkpoints import open_clip_format, sharded
from clipup.train.checkpoints.open_clip_format import load


@pytest.fixture
def run(make_model, pairs, options):
    """Three steps an epoch."""

    def run(callbacks=(), moe=None, **changes):
        chosen = options(**{"fsdp_checkpoint": "sharded", "lr_scheduler": "const", **changes})
        return train(chosen, model=make_model(moe), loader=pairs(), callbacks=callbacks)

    return run


def names(result):
    return sorted(path.name for path in (result.directory / "checkpoints").iterdir())


def newest(result):
    return open_clip_format.newest(result.directory / "checkpoints").path


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_sharded_checkpoint_holds_what_a_full_one_holds(run):
    sharded = load(newest(run(name="sharded")))
    full = load(run(name="full", fsdp_checkpoint="full").directory / "checkpoints" / "epoch_latest.pt")

    assert set(sharded) == set(full)
    assert list(sharded["state_dict"]) and set(sharded["state_dict"]) == set(full["state_dict"])
    assert all(torch.equal(value, sharded["state_dict"][name]) for name, value in full["state_dict"].items())
    assert len(sharded["optimizer"]["by_name"]) == len(full["optimizer"]["state"])
    assert sharded["step"] == 6 and sharded["finished"]


@pytest.mark.parametrize("first,then", [("sharded", "full"), ("full", "sharded"), ("sharded", "sharded")])
def test_a_resumed_run_equals_the_uninterrupted_one_with_either_kind_of_checkpoint(run, first, then):
    whole = run(name="whole")

    run(steps=4, fsdp_checkpoint=first)
    resumed = run(resume="latest", fsdp_checkpoint=then)

    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(
    "opt",
    [  # what they hold besides tensors: a count of steps in their groups, or numbers by parameter
        "timm/lamb",
        "timm/madgrad",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("timm/adan", "timm/muon", "timm/laprop")),
    ],
)
@pytest.mark.parametrize("first,then", [("sharded", "full"), ("full", "sharded"), ("sharded", "sharded")])
def test_other_optimizers_are_continued_too(run, opt, first, then):
    whole = run(name="whole", opt=opt)

    run(steps=2, opt=opt, fsdp_checkpoint=first)
    run(steps=4, opt=opt, fsdp_checkpoint=then, resume="latest")
    resumed = run(opt=opt, fsdp_checkpoint=first, resume="latest")

    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert same_weights(resumed.model, whole.model)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(run, monkeypatch):
    trained_on, writing, most = threading.Event(), [], []
    save = sharded.write

    def slow(tensors, directory, *arguments):
        writing.append(directory)
        most.append(len(writing))
        in_time = trained_on.wait(20)
        writing.remove(directory)
        assert in_time, "training waited"
        save(tensors, directory, *arguments)

    monkeypatch.setattr(sharded, "write", slow)
    step = iter(range(1, 7))
    result = run([Every(1, lambda model: trained_on.set() if next(step) == 3 else None)], save_every_n_steps=2)

    assert result.steps == 6 and set(most) == {1}
    assert load(newest(result))["step"] == 6


def test_ctrl_c_waits_for_the_checkpoint_that_it_names(run, monkeypatch):
    save = sharded.write
    monkeypatch.setattr(sharded, "write", lambda *a: (threading.Event().wait(0.3), save(*a))[1])

    with pytest.raises(TrainingInterrupted) as stopped:
        run([Every(2, lambda model: os.kill(os.getpid(), signal.SIGINT))])

    assert stopped.value.checkpoint.name == "step_2"
    assert load(stopped.value.checkpoint)["step"] == 2


def test_a_checkpoint_that_could_not_be_written_ends_the_run_and_the_one_before_is_whole(run, monkeypatch):
    save = sharded.write

    def full_disk(tensors, directory, *arguments):
        if directory.parent.joinpath("step_2").exists():
            (directory / "half.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, directory, *arguments)

    monkeypatch.setattr(sharded, "write", full_disk)
    with pytest.raises(OSError, match="step_4: .*No space left"):
        run(save_every_n_steps=2, steps=8, save_frequency=0, save_most_recent=False)

    monkeypatch.undo()
    resumed = run(steps=8, resume="latest")
    assert resumed.steps == 8 and not any(name.startswith(".") for name in names(resumed))


@pytest.mark.parametrize(
    "changes,kept",
    [
        ({}, ["epoch_1", "epoch_2", "epoch_3"]),
        ({"save_total_limit": 2}, ["epoch_3", "step_8"]),
        ({"save_total_limit": 3}, ["epoch_2", "epoch_3", "step_8"]),
        ({"save_frequency": 0}, ["step_9"]),
        ({"delete_previous_checkpoint": True, "save_every_n_steps": 0}, ["epoch_3"]),
        ({"save_total_limit": 2, "fsdp_checkpoint": "full"}, ["epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"]),
    ],
)
def test_so_many_checkpoints_are_kept(run, changes, kept):
    assert names(run(**{"steps": 9, "save_every_n_steps": 2, **changes})) == kept


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def remove(path):
    path.unlink()


def another(path):
    shutil.copy(path, path.with_name(f"more{path.suffix}"))


@pytest.mark.parametrize(
    ("files", "damage"),
    [
        *((files, flip) for files in ("*.safetensors", "index.json", "state.pt")),
        *(("*.safetensors", damage) for damage in (cut, remove, another)),
        *(
            pytest.param(f, damage, marks=pytest.mark.slow)
            for f in ("index.json", "state.pt")
            for damage in (cut, remove)
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, files, damage):
    first = run()
    folder = first.directory / "checkpoints"
    [path] = (folder / "epoch_2").glob(files)
    damage(path)

    with pytest.raises(ValueError, match="epoch_2.*(missing|damaged)"):
        run(resume=str(folder / "epoch_2"))
    resumed = run(resume="latest")

    assert "epoch_1, because a checkpoint cannot be used" in (first.directory / "out.log").read_text()
    assert same_weights(first.model, resumed.model)
    assert load(folder / "epoch_2")["step"] == 6


def test_a_checkpoint_whose_writer_was_killed_has_no_name_and_is_removed(run):
    folder = run(steps=4).directory / "checkpoints"
    for place in (folder, folder / "step_4"):
        (place / ".writing.elsewhere.1.00000000.tmp").mkdir()

    result = run(steps=6, resume="latest", save_total_limit=5)

    assert "from step 4 to step 6 on cpu" in (result.directory / "out.log").read_text()
    assert names(result) == ["epoch_1", "epoch_2", "step_4"]
    assert not list(folder.rglob(".writing*"))


@pytest.fixture
def stranger(tmp_path):
    """A pickle that creates a file when it is executed, and that file."""
    made = tmp_path / "executed"
    return pickle.dumps({"epoch": 1, "step": 99, "x": MakesFile(made)}), made


@pytest.mark.parametrize("file", ["state.pt", ".metadata", "more.safetensors", "index.json"])
def test_nothing_in_a_checkpoint_is_executed(run, stranger, tmp_path, file, capsys):
    content, made = stranger
    result = run(steps=3, save_frequency=0)
    path = newest(result)
    (path / file).write_bytes(content)

    if file == ".metadata":  # torch's own index, which is not read
        assert run(steps=4, resume="latest").steps == 4
    else:
        for resume in ("latest", str(path)):
            with pytest.raises(ValueError, match=file):
                run(steps=4, resume=resume)
    main(["convert", str(path), str(tmp_path / "converted")])

    assert not made.exists()


def test_convert_makes_a_model_directory_of_either_kind_of_checkpoint(run, named_model, tmp_path, capsys):
    for kind in ("sharded", "full"):
        result = run(name=kind, moe=MoEConfig.clip_up(num_experts=2), model=named_model, fsdp_checkpoint=kind)
        path = newest(result) if kind == "sharded" else result.directory / "checkpoints" / "epoch_latest.pt"

        assert main(["convert", str(path), str(tmp_path / kind)]) == 0

        made, _, _ = clipup.create_model_and_transforms(str(tmp_path / kind))
        assert same_weights(made, result.model)
    files = [sorted(file.name for file in (tmp_path / kind).iterdir()) for kind in ("sharded", "full")]
    assert files[0] == files[1] == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
