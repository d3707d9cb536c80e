"""A run's directory is copied to another place while the run goes on; a copy that fails costs nothing."""

from __future__ import annotations

import filecmp
import logging
import os
from pathlib import Path

import fsspec
import pytest

from clipup.train import train
from clipup.train.checkpoints.remote_sync import RemoteSync

LOG = logging.getLogger("test")


@pytest.fixture
def sync(tmp_path):
    """Copies of ``tmp_path/run`` at ``tmp_path/there``, with the messages about failures."""
    (tmp_path / "run").mkdir()
    messages = []

    def make(remote=None, protocol="fsspec"):
        return RemoteSync(tmp_path / "run", remote or f"file://{tmp_path}/there", protocol, 1000, messages.append, LOG)

    make.messages = messages
    return make


def test_a_run_is_whole_at_the_other_place(make_model, pairs, options, tmp_path):
    result = train(
        options(remote_sync=f"file://{tmp_path}/there", remote_sync_protocol="fsspec", save_every_n_steps=2),
        model=make_model(),
        loader=pairs(),
    )

    here, there = result.directory, tmp_path / "there" / "run"
    names = {path.relative_to(here) for path in here.rglob("*") if path.is_file() and path.name != ".lock"}
    assert Path("checkpoints/epoch_latest.pt") in names
    assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == names
    assert all(filecmp.cmp(here / name, there / name, shallow=False) for name in names - {Path("out.log")})


def test_only_files_that_have_changed_are_copied_and_none_that_is_being_written(sync, tmp_path, monkeypatch):
    run, copier = tmp_path / "run", sync()
    for name in ("a.pt", "b.jsonl", ".lock", ".clipup.host.1.00000000.tmp"):
        (run / name).write_text("1")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "epoch_1.pt").write_text("1")
    put, copied = fsspec.filesystem("file").put_file, []
    monkeypatch.setattr(
        type(copier._files),
        "put_file",
        lambda _, here, there: (copied.append(Path(here).name), put(here, there)),
    )

    assert copier.copy()
    (run / "b.jsonl").write_text("12")
    assert copier.copy()

    assert copied == ["a.pt", "b.jsonl", "epoch_1.pt", "b.jsonl"]
    assert (tmp_path / "there" / "b.jsonl").read_text() == "12"


def test_a_copy_that_fails_is_reported_once_and_tried_again(sync, tmp_path):
    (tmp_path / "there").write_text("a file where the directory should be")
    (tmp_path / "run" / "a.pt").write_text("1")
    copier = sync()

    assert not copier.copy() and not copier.copy()
    assert f"remote sync to file://{tmp_path}/there failed: " in sync.messages[0]
    (tmp_path / "there").unlink()
    copier.close()
    assert (tmp_path / "there" / "a.pt").read_text() == "1"


def test_s3_is_copied_by_awss_program(sync, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    refusal = f"[ ! -e {tmp_path}/broken ] || {{ echo no access >&2; exit 1; }}"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{refusal}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    copier = sync("s3://bucket/runs/run", "s3")

    assert copier.copy()
    (tmp_path / "broken").touch()
    assert not copier.copy()

    call = (tmp_path / "calls").read_text().splitlines()[0]
    assert call.startswith(f"s3 sync {tmp_path}/run s3://bucket/runs/run ") and "--exclude *.tmp*" in call
    assert "failed: no access; the files in" in sync.messages[0]
