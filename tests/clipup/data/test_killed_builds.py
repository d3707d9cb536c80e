"""Killed builds of data sets, and concurrent ones."""

import multiprocessing
import time

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


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_damaged_data_set_is_built_again(tmp_path):
    out = tmp_path / "data"
    build(out)
    path = out / "test-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="--overwrite"):
        build(out)
    build(out, overwrite=True)
    assert path.read_bytes() == whole and names(tmp_path) == ["data"]


def test_a_build_is_not_disturbed_by_another_one_and_leaves_nothing_when_it_is_killed(tmp_path, monkeypatch):
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
    assert list(tmp_path.glob(".*/data/*.tar"))
    assert len(build(out)["splits"]) == 3
    assert names(tmp_path) == ["data"]
