"""Disks that fail for a moment or for good, shards that change, and ranks that found other samples: training on data
other than the indexed ones is an error."""

import errno
import io
import logging
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from picture_samples import epoch_of, load, pictures_of, preprocess

from clipup.data import csv_files, evaluation, shard_names, shards
from clipup.data.loaders import eval_samples
from clipup.train.training_data import Epochs

KINDS = ("csv", "webdataset", "cached csv", "cached webdataset")


@pytest.fixture
def disk(monkeypatch):
    """The next ``failures`` reads of the file ``name`` fail."""

    class Disk:
        name, failures = "", 0

        def open(self, path, mode="r", **options):
            return File(path) if os.path.basename(path) == self.name else open(path, mode, **options)

    class File(io.FileIO):
        def read(self, size=-1):
            if disk.failures:
                disk.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    disk = Disk()
    for module in (shards, evaluation, csv_files):
        monkeypatch.setattr(module, "open", disk.open, raising=False)
    monkeypatch.setattr(Path, "read_bytes", lambda path: disk.open(str(path), "rb").read())
    return disk


@pytest.mark.parametrize(
    "kind, name, when",
    [
        ("webdataset", "train-000002.tar", "indexed"),
        ("webdataset", "train-000002.tar", "read"),
        ("cached csv", "5.png", "read"),
    ],
)
def test_a_read_that_fails_for_a_moment_is_repeated(pictures, disk, pauses, kind, name, when, caplog):
    source = pictures.source(kind)
    data = load(kind, source) if "cached" not in kind and when == "read" else None
    disk.name, disk.failures = name, 1
    with caplog.at_level(logging.WARNING):
        data = data or load(kind, source)
        assert sorted(pictures_of(data)) == list(range(24))
    assert (data.skipped, len(pauses), disk.failures) == (0, 1, 0)
    assert "again: [Errno 5]" in caplog.text


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "evaluation"])
def test_a_shard_that_cannot_be_read_to_its_end_is_an_error_that_names_it(pictures, disk, pauses, kind, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(pictures.folder / "cache"))
    monkeypatch.setattr(shards, "_KEPT_FROM_SECONDS", -1)
    disk.name, disk.failures = "train-000002.tar", 10**9
    source = pictures.shards()
    with pytest.raises(OSError, match=r"(train_data|source): .*train-000002\.tar cannot be read"):
        eval_samples(source, preprocess) if kind == "evaluation" else load(kind, source)
    assert len(pauses) == 4
    disk.failures = 0  # and no index of a part is kept
    assert kind == "evaluation" or sorted(pictures_of(load(kind, source))) == list(range(24))


def test_a_lost_disk_does_not_delay_every_sample(pictures, pauses, monkeypatch):
    data = load("webdataset", pictures.shards())

    def lost(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards, "content_at", lost)
    with pytest.raises(ValueError, match="Input/output error"):
        epoch_of(data)
    assert len(pauses) == 4


def compare(*ranks):
    """What the ranks compare before the first step, one after the other."""
    values = []
    for one in ranks:
        with pytest.raises(ZeroDivisionError):
            one.check_alike(lambda value: values.append(value) or 1 / 0)
    for one in ranks:
        one.check_alike(lambda value: values)


def rank_of(kind, source, number, **options):
    return Epochs(load(kind, source, world_size=2, rank=number, **{"max_skipped": 0.5, **options}), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_found_different_samples_or_have_other_options_do_not_train(pictures, kind):
    source = pictures.source(kind)
    first = rank_of(kind, source, 0)
    compare(first, rank_of(kind, source, 1, data_retries=0))
    for option, value in {"seed": 7, "max_image_pixels": 10**5, "max_skipped": 0.1}.items():
        with pytest.raises(ValueError, match=f"ranks 0 and 1 differ in .*{option}"):
            compare(first, rank_of(kind, source, 1, **{option: value}))
    if "csv" in kind:
        (pictures.folder / "3.png").unlink()
    else:
        pictures.damage(1, "s11.png", header=True)
    with pytest.raises(ValueError, match="train_data: ranks 0 and 1 differ in .*rows 24 and 23"):
        compare(first, rank_of(kind, source, 1))


def test_ranks_that_stream_different_shards_do_not_train(pictures):
    pictures.shards()
    sources = [f"file:{pictures.folder}/train-{{000000..00000{last}}}.tar" for last in (3, 2)]
    compare(rank_of("streamed", sources[0], 0), rank_of("streamed", sources[0], 1))
    for options, error in (({"dataset_resampled": True}, False), ({}, True)):  # every rank draws from its own shards
        ranks = [rank_of("streamed", source, number, **options) for number, source in enumerate(sources)]
        with pytest.raises(ValueError, match="differ in .*shards") if error else nullcontext():
            compare(*ranks)


def test_ranks_may_read_the_same_shards_from_different_servers():
    digest = shard_names.names_digest
    first = digest(["https://a.example/s/0.tar?key=1", "pipe:cat /a/1.tar"])
    assert first == digest(["https://b.example/0.tar", "pipe:cat b/1.tar"]) != digest(["https://a.example/s/2.tar"])


def test_a_shard_that_was_replaced_after_it_was_indexed_is_an_error_that_names_it(pictures):
    source = pictures.shards(shards=1)
    data = load("webdataset", source)
    os.utime(pictures.folder / "train-000000.tar", ns=(0, 0))
    with pytest.raises(ValueError, match=r"train-000000\.tar was replaced or changed"):
        epoch_of(data)
    assert load("webdataset", source).order == data.order  # which does not depend on when they were written
