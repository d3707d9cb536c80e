"""Bad input, full disks and failing callbacks end a run with a clear error, and nothing is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from clipup.train import Every, train
from clipup.train.checkpoints.open_clip_format import load
from clipup.train.log.records import LOG


@pytest.fixture
def run(make_model, pairs, options):
    def run(model=None, loader=None, **changes):
        return train(options(**changes), model=model or make_model(), loader=loader or pairs())

    return run


class FullDisk:
    """A file of which 100 kB more can be written."""

    def __init__(self, file):
        self.file, self.room = file, 100_000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def test_a_full_disk_leaves_the_previous_checkpoint_intact_and_no_temporary_files(run, options, monkeypatch):
    save, calls = torch.save, []

    def save_until_full(state, file):
        calls.append(file)
        save(state, FullDisk(file) if len(calls) == 2 else file)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(OSError, match=r"could not write the checkpoint.*No space left.*--resume latest"):
        run(save_every_n_steps=2)

    folder = Path(options().logs) / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["epoch_latest.pt"]
    assert load(folder / "epoch_latest.pt")["step"] == 2


@pytest.mark.parametrize(
    "mistake, error",
    [
        ({"remote_sync": "nowhere://x", "remote_sync_protocol": "fsspec"}, "nowhere"),
        ({"report_to": "tensorboard,wandb"}, "needs the package wandb"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_before_force_replaces_a_run(run, monkeypatch, mistake, error):
    directory = run().directory
    (directory / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises((ValueError, ImportError), match=error):
        run(force=True, **mistake)

    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert not LOG.handlers
    assert [record["step"] for record in run(steps=2, force=True).history] == [1, 2]
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"epoch_latest.pt"}
    assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"}),
        ({"save_frequency": 0}, {"epoch_latest.pt"}),
        ({"delete_previous_checkpoint": True, "save_frequency": 2}, {"epoch_2.pt", "epoch_latest.pt"}),
        ({"delete_previous_checkpoint": True, "save_most_recent": False}, {"epoch_3.pt", "epoch_latest.pt"}),
    ],
)
def test_checkpoints_are_kept_as_asked(run, pairs, changes, expected):
    result = run(loader=pairs(pairs=4, batch_size=4), steps=None, epochs=3, **changes)

    assert {path.name for path in (result.directory / "checkpoints").iterdir()} == expected


def test_a_data_worker_that_is_killed_ends_the_run_with_one_message_and_no_half_written_checkpoint(
    model_directory, csv_data, options, monkeypatch
):
    """Killed while a checkpoint is written: that one becomes whole, and the run ends when it waits for data."""
    saves = []

    def kill_meanwhile(state, path):
        saves.append(path)
        if len(saves) == 2:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.3)
        torch.save(state, path)

    monkeypatch.setattr("clipup.train.checkpoints.open_clip_format.write_pickle", kill_meanwhile)
    message = r"a data worker has ended.*The last checkpoint is (.*); .*--resume latest"
    data = {"model": str(model_directory), "train_data": str(csv_data), "workers": 1, "batch_size": 2}
    with pytest.raises(ChildProcessError, match=message) as raised:
        train(options(**data, steps=40, save_every_n_steps=2))

    assert load(Path(re.search(message, str(raised.value)).group(1)))["step"] >= 4


def test_no_data_worker_outlives_a_run_that_fails(model_directory, csv_data, options):
    workers = []

    def fail(model):
        workers.extend(multiprocessing.active_children())
        raise RuntimeError("the callback failed")

    settings = options(model=str(model_directory), train_data=csv_data, workers=2, batch_size=4)
    with pytest.raises(RuntimeError, match="the callback failed") as raised:
        train(settings, callbacks=[Every(2, fail)])

    assert len(workers) == 2 and raised.tb is not None  # the traceback holds the frames of the run
    assert multiprocessing.active_children() == []
