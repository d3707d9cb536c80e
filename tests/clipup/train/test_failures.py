"""Bad input, full disks and failing callbacks end a run with a clear error, and nothing is lost."""

import errno
import multiprocessing
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from same_runs import contents

from clipup.data.loaders import train_loader
from clipup.train import Every
from clipup.train.checkpoints import sharded
from clipup.train.checkpoints.format import load
from clipup.train.log.records import LOG


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_full_disk_leaves_the_previous_checkpoint_intact_and_no_temporary_files(run, options, monkeypatch, kind):
    module, name = (torch, "save") if kind == "full" else (sharded, "write")
    write, calls = getattr(module, name), []

    def write_until_full(content, place, *arguments):
        calls.append(place)
        if len(calls) == 2:
            if kind == "full":
                place.write(bytes(100_000))
            else:
                (place / "half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, place, *arguments)

    monkeypatch.setattr(module, name, write_until_full)
    changes = {"fsdp_checkpoint": kind, "save_every_n_steps": 2, "steps": 8, "save_frequency": 0}
    with pytest.raises(OSError, match="No space left"):
        run(**changes, save_most_recent=False)

    folder = Path(options().checkpoints.logs) / "run" / "checkpoints"
    [path] = folder.iterdir()
    assert path.name == ("epoch_latest.pt" if kind == "full" else "step_2") and load(path)["step"] == 2
    monkeypatch.undo()
    assert run(**changes, resume="latest").history[-1]["step"] == 8


def test_what_cannot_be_reported_to_is_refused_before_force_replaces_a_run(run, monkeypatch):
    directory = run().directory
    before = contents(directory)
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(ImportError, match="needs the package wandb"):
        run(force=True, report_to="tensorboard,wandb")

    assert contents(directory) == before and not LOG.handlers
    assert [record["step"] for record in run(steps=2, force=True).history] == [1, 2]
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"epoch_latest.pt"}


def test_a_loader_that_was_made_for_another_accumulation_is_refused(run, csv_data):
    preprocess, tokenizer = open_clip.image_transform(16, is_train=True), open_clip.SimpleTokenizer(context_length=8)
    loader = train_loader(csv_data, preprocess, tokenizer, batch_size=4, workers=0, accum_freq=2)
    assert run(loader=loader, accum_freq=2, epochs=1).steps == 3
    with pytest.raises(ValueError, match="accum_freq is 4, but the loader was made with 2"):
        run(name="other", loader=loader, accum_freq=4)


def test_a_data_worker_that_is_killed_ends_the_run_with_its_last_step_saved(run, options, csv_data):
    workers = multiprocessing.active_children
    kill = Every(2, lambda model: [worker.kill() for worker in workers() if worker.daemon] and None)
    with pytest.raises(ChildProcessError, match="--name run --resume latest"):
        run([kill], train_data=csv_data, workers=1, batch_size=2, save_frequency=0)

    [path] = (Path(options().checkpoints.logs) / "run" / "checkpoints").iterdir()
    assert load(path)["step"] >= 2
