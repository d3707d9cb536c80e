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
from same_runs import contents

from clipup.train import Every, train
from clipup.train.checkpoints import sharded
from clipup.train.checkpoints.open_clip_format import load
from clipup.train.log.records import LOG


@pytest.fixture
def run(make_model, pairs, options):
    def run(model=None, loader=None, **changes):
        return train(options(**changes), model=model or make_model(), loader=loader or pairs())

    return run


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

    folder = Path(options().logs) / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["epoch_latest.pt" if kind == "full" else "step_2"]
    assert load(next(folder.iterdir()))["step"] == 2
    monkeypatch.undo()
    assert run(**changes, resume="latest").history[-1]["step"] == 8


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
    before = contents(directory)
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises((ValueError, ImportError), match=error):
        run(force=True, **mistake)

    assert contents(directory) == before
    assert not LOG.handlers
    assert [record["step"] for record in run(steps=2, force=True).history] == [1, 2]
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"epoch_latest.pt"}
    assert (directory / "notes.txt").read_text() == "mine"


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
    message = r"a data worker has ended.*The last checkpoint is (.*);.*--resume latest"
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
