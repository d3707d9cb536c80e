"""Killed builds of data sets, and concurrent ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from clipup.data import shard_writer
from clipup.demo.pictograms import build as pictograms
from clipup.locks import DirectoryInUse

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _few_concepts(all_splits, monkeypatch):
    """Reading all of them takes longer than drawing these."""
    few = {concept.key: concept for members in (all_splits.train, all_splits.test) for concept, _ in members[:4]}
    monkeypatch.setattr(pictograms.sources, "concepts", lambda: list(few.values()))


def build(out, **options):
    return pictograms.build(out, processes=1, progress=False, **options)


def in_a_process(action):
    process = FORK.Process(target=action)
    process.start()
    return process


def kill_self(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_files_of_a_killed_build_are_removed_by_the_next_one(tmp_path, monkeypatch):
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_sizes", kill_self)  # after the shards
        in_a_process(lambda: build(out)).join()
    left = [name for name in names(tmp_path) if name.startswith(".data.building-")]
    assert len(left) == 1 and list((tmp_path / left[0]).glob("*.tar"))

    build(out)

    assert names(tmp_path) == ["data"]


def test_a_data_set_whose_replacement_was_killed_is_restored(tmp_path, monkeypatch):
    out = tmp_path / "data"
    before = build(out)
    rename, calls = Path.rename, []

    def kill_at_the_second(self, target):
        calls.append(target)
        return rename(self, target) if len(calls) == 1 else kill_self()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill_at_the_second)  # between moving the old one away and the new one into place
        in_a_process(lambda: build(out, size=40, overwrite=True)).join()
    assert not out.exists()

    with pytest.raises(ValueError, match="contains another data set"):
        build(out, size=40)

    assert names(tmp_path) == ["data"]
    assert build(out) == before


def test_a_build_in_progress_is_not_disturbed_by_another_one(tmp_path, monkeypatch):
    out, writing = tmp_path / "data", FORK.Event()

    def wait(*args):
        writing.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_sizes", wait)
        process = in_a_process(lambda: build(out))
        assert writing.wait(30)
    before = names(tmp_path)

    with pytest.raises(DirectoryInUse, match=rf"data is in use by process {process.pid} on .*name another directory"):
        build(out)
    assert names(tmp_path) == before

    process.kill()
    process.join()
    assert len(build(out)["splits"]) == 3
    assert names(tmp_path) == ["data"]


def test_a_finished_data_set_in_a_read_only_directory_is_read(tmp_path, monkeypatch):
    build(tmp_path / "data")

    def no_lock(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(shard_writer, "exclusive", no_lock)

    assert build(tmp_path / "data")["name"] == "pictograms"
