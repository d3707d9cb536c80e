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

import clipup
from clipup.train import Every, train
from clipup.train.checkpoints.open_clip_format import load
from clipup.train.log.records import LOG


@pytest.fixture
def run(make_model, pairs, options):
    def run(model=None, loader=None, **changes):
        return train(options(**changes), model=model or make_model(), loader=loader or pairs())

    return run


class BreaksOff:
    """A file of which 100 kB more can be written."""

    def __init__(self, file, reason):
        self.file, self.room, self.reason = file, 100_000, reason

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.reason
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.fixture
def second_checkpoint_breaks_off(monkeypatch):
    """Lets writing end with an error; the value holds the paths that were written to."""
    save, calls = torch.save, []

    def install(reason):
        def save_until(state, file):
            calls.append(Path(file.name))
            save(state, BreaksOff(file, reason) if len(calls) == 2 else file)

        monkeypatch.setattr(torch, "save", save_until)
        return calls

    return install


def assert_the_first_is_whole(written):
    folder = written[0].parent.parent  # from the temporary directory beside it
    assert [path.name for path in folder.iterdir()] == ["epoch_latest.pt"]
    assert load(folder / "epoch_latest.pt")["step"] == 2


def test_a_full_disk_leaves_the_previous_checkpoint_intact_and_no_temporary_files(run, second_checkpoint_breaks_off):
    written = second_checkpoint_breaks_off(OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(OSError, match="No space left.*--resume latest") as failure:
        run(save_every_n_steps=2)

    assert_the_first_is_whole(written)
    assert "could not write the checkpoint" in str(failure.value)


def test_force_replaces_the_run_that_was_there_and_keeps_foreign_files(run):
    first = run(steps=9)
    (first.directory / "notes.txt").write_text("mine")

    second = run(steps=4, force=True)

    assert [record["step"] for record in second.history] == [1, 2, 3, 4]
    assert {path.name for path in (second.directory / "checkpoints").iterdir()} == {"epoch_1.pt", "epoch_latest.pt"}
    assert (second.directory / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "mistake,error",
    [
        ({"remote_sync": "nowhere://x", "remote_sync_protocol": "fsspec"}, "nowhere"),
        ({"report_to": "tensorboard,wandb"}, "needs the package wandb"),
    ],
    ids=str,
)
def test_what_cannot_be_reported_to_is_refused_before_force_discards_a_run(run, monkeypatch, mistake, error):
    directory = run().directory
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises((ValueError, ImportError), match=error):
        run(force=True, **{name: value.replace("{run}", str(directory)) for name, value in mistake.items()})

    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert not LOG.handlers


def test_a_checkpoint_of_another_model_is_refused_by_what_differs(run, make_model):
    run(model=make_model(clipup.MoEConfig(num_experts=4)))

    with pytest.raises(ValueError, match="another model: .* tensors differ"):
        run(resume="latest")
    with pytest.raises(ValueError, match="was trained with num_experts=4, the model has num_experts=8"):
        run(model=make_model(clipup.MoEConfig(num_experts=8)), resume="latest")


def test_weights_alone_and_broken_files_are_refused_as_checkpoints(run, make_model, tmp_path):
    torch.save(make_model().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK nothing")

    with pytest.raises(ValueError, match="lacks epoch, state_dict, optimizer.*--pretrained"):
        run(resume=str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="broken.pt"):
        run(resume=str(tmp_path / "broken.pt"))
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        run(resume=str(tmp_path / "missing.pt"))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_4.pt", "epoch_latest.pt"}),
        ({"save_frequency": 2}, {"epoch_2.pt", "epoch_4.pt", "epoch_latest.pt"}),
        ({"save_frequency": 0}, {"epoch_latest.pt"}),
        ({"delete_previous_checkpoint": True}, {"epoch_4.pt", "epoch_latest.pt"}),
        ({"delete_previous_checkpoint": True, "save_frequency": 2}, {"epoch_4.pt", "epoch_latest.pt"}),
        ({"delete_previous_checkpoint": True, "save_frequency": 3}, {"epoch_3.pt", "epoch_latest.pt"}),
    ],
)
def test_checkpoints_are_kept_as_asked(run, changes, expected):
    result = run(steps=None, epochs=4, **changes)

    assert {path.name for path in (result.directory / "checkpoints").iterdir()} == expected


def test_a_data_worker_that_is_killed_ends_the_run_with_one_message_and_no_half_written_checkpoint(
    make_model, model_directory, csv_data, options, monkeypatch
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
    message = r"a data worker has ended.*The last checkpoint, (.*), is whole.*--resume latest"
    data = {"model": str(model_directory), "train_data": str(csv_data), "workers": 1, "batch_size": 2}
    with pytest.raises(ChildProcessError, match=message) as raised:
        train(options(**data, steps=40, save_every_n_steps=2))

    assert load(Path(re.search(message, str(raised.value)).group(1)))["step"] >= 4


@pytest.mark.parametrize("source", ["csv", "webdataset"])
def test_no_data_worker_outlives_a_run_that_fails(model_directory, csv_data, shards, options, source):
    data = {"train_data": csv_data} if source == "csv" else {"train_data": shards, "train_num_samples": 24}
    workers = []

    def fail(model):
        workers.extend(multiprocessing.active_children())
        raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed") as raised:
        train(options(model=str(model_directory), workers=2, batch_size=4, **data), callbacks=[Every(2, fail)])

    assert len(workers) == 2 and raised.tb is not None  # the traceback holds the frames of the run
    assert multiprocessing.active_children() == []
