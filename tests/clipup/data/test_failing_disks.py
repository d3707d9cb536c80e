"""Disks that fail for a moment or for good, shards that change, and ranks that found other samples: nothing is trained
on other data than the indexed ones, without a word."""

from __future__ import annotations

import errno
import io
import os

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data import samples, shard_names, skips, sources
from clipup.data.loaders import eval_samples, train_loader
from clipup.data.skips import Skips
from clipup.train.training_data import Epochs

KINDS = ("csv", "webdataset", "cached csv", "cached webdataset")


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which take no time."""
    taken = []
    monkeypatch.setattr(skips, "sleep", taken.append)
    return taken


@pytest.fixture
def disk(monkeypatch):
    """Files that fail to be read, at every third read of one with this name, so often."""

    class Disk:
        name, failures, reads, every = "", 0, 0, 3

        def open(self, path, mode="r", **options):
            return File(path) if os.path.basename(path) == self.name else open(path, mode, **options)

    class File(io.FileIO):
        def read(self, size=-1):
            disk.reads += 1
            if disk.reads % disk.every == 0 and disk.failures:
                disk.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    disk = Disk()
    for module in (sources, samples):
        monkeypatch.setattr(module, "open", disk.open, raising=False)
    return disk


def loader(kind, source, **options):
    options = {"max_skipped": 0.5, "progress": False, **options}
    return train_loader(source, preprocess, tokenizer, 3, 0, cache="cached" in kind, **options)


def pictures_of(data, epoch=0):
    data.set_epoch(epoch)
    return sorted(picture for picture, _, _ in samples_of(data.dataloader))


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset"])
def test_a_read_that_fails_for_a_moment_while_a_shard_is_indexed_is_repeated(pictures, disk, pauses, kind):
    disk.name, disk.failures = "train-000002.tar", 1
    data = loader(kind, pictures.shards())
    assert pictures_of(data) == list(range(24))
    assert (data.skipped, data.skips.retries, len(pauses)) == (0, 1, 1)


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "evaluation"])
def test_a_shard_that_cannot_be_read_to_its_end_is_an_error_that_names_it(pictures, disk, pauses, kind):
    disk.name, disk.failures = "train-000002.tar", 10**9
    source = pictures.shards()
    read = (lambda: eval_samples(source, preprocess)) if kind == "evaluation" else (lambda: loader(kind, source))
    with pytest.raises(OSError, match=r"(train_data|source): .*train-000002\.tar cannot be read .*Input/output error"):
        read()
    assert len(pauses) == 4


def test_no_index_is_kept_of_a_shard_that_could_not_be_read(pictures, disk, pauses, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_KEPT_FROM_SECONDS", -1)
    source = pictures.shards()
    disk.name, disk.failures = "train-000002.tar", 1
    with pytest.raises(OSError, match="cannot be read"):
        loader("webdataset", source, data_retries=0)
    assert pictures_of(loader("webdataset", source)) == list(range(24))


def test_images_read_into_memory_are_read_again_after_an_error(pictures, pauses, disk):
    source = pictures.csv()
    disk.name, disk.failures, disk.reads = "5.png", 1, 2
    data = loader("cached csv", source)
    assert pictures_of(data) == list(range(24))
    assert (data.skipped, data.skips.retries, len(pauses)) == (0, 1, 1)


def compare(*ranks):
    """What the ranks compare before the first step, one after the other."""
    values = []
    for one in ranks:
        with pytest.raises(ZeroDivisionError):
            one.check_alike(lambda value: values.append(value) or 1 / 0)
    for one in ranks:
        one.check_alike(lambda value: values)


def rank_of(kind, source, number, **options):
    if kind == "streamed":
        source, options = f"file:{source}", {"train_num_samples": 24, **options}
    return Epochs(loader(kind, source, world_size=2, rank=number, **options), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_found_different_samples_do_not_train(pictures, kind):
    source = pictures.csv() if "csv" in kind else pictures.shards()
    first, second = rank_of(kind, source, 0), rank_of(kind, source, 1)
    compare(first, second)
    if "csv" in kind:
        (pictures.folder / "3.png").unlink()
    else:
        pictures.damage_header(1, "s7.png")
    with pytest.raises(ValueError, match="train_data: ranks 0 and 1 differ in .*rows 24 and 23"):
        compare(first, rank_of(kind, source, 1))


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("change", ["one more", "another size", "another name", "missing"])
def test_ranks_that_stream_different_shards_do_not_train(pictures, resampled, change, tmp_path):
    names = [f"train-00000{n}.tar" for n in range(4)]
    directories = tmp_path / "a", tmp_path / "b"
    sources = []
    for directory in directories:
        pictures.folder = directory
        directory.mkdir()
        pictures.shards()
        (directory / "sizes.json").unlink()
        sources.append("::".join(f"file:{directory / name}" for name in names))

    def rank(number):
        options = {"dataset_resampled": resampled, "train_num_samples": 24, "data_retries": 0}
        return Epochs(loader("streamed", sources[number], world_size=2, rank=number, **options), 1)

    compare(rank(0), rank(1))
    last = directories[1] / names[3]
    if change == "one more":
        sources[1] += f"::file:{last}"
    elif change == "another size":
        last.write_bytes(last.read_bytes() + bytes(10240))
    elif change == "another name":
        sources[1] = sources[1].replace(names[3], "other.tar")
        last.rename(last.with_name("other.tar"))
    else:
        last.unlink()
    if resampled:  # every rank draws from shards of its own
        compare(rank(0), rank(1))
        return
    with pytest.raises(ValueError, match=r"train_data: ranks 0 and 1 differ in .*shards"):
        compare(rank(0), rank(1))


def test_ranks_may_read_the_same_shards_from_servers_of_their_own():
    of_ranks = (
        ["https://a.example/s/0.tar?key=1", "pipe:cat /a/1.tar"],
        ["https://b.example/0.tar", "pipe:cat b/1.tar"],
    )
    first, second = (shard_names.digest_of(shards, skips.Retries(0, Skips())) for shards in of_ranks)
    assert first == second != shard_names.digest_of(["https://a.example/s/2.tar"], skips.Retries(0, Skips()))


@pytest.mark.parametrize("option", ["seed", "max_image_pixels", "max_skipped"])
@pytest.mark.parametrize("kind", [*KINDS, "streamed"])
def test_ranks_with_different_options_of_the_data_do_not_train(pictures, kind, option):
    source = pictures.csv() if "csv" in kind else pictures.shards()
    usual, other = {"seed": (0, 1), "max_image_pixels": (10**6, 10**5), "max_skipped": (0.5, 0.1)}[option]
    with pytest.raises(ValueError, match=f"ranks 0 and 1 differ in .*{option} {usual!r} and {other!r}"):
        compare(rank_of(kind, source, 0, **{option: usual}), rank_of(kind, source, 1, **{option: other}))


@pytest.mark.parametrize("kind", ["webdataset", "evaluation"])
@pytest.mark.parametrize("change", ["other captions", "time"])
def test_a_shard_that_was_replaced_after_it_was_indexed_is_an_error_that_names_it(pictures, picture, kind, change):
    source = pictures.shards(shards=1)
    data = eval_samples(source, preprocess) if kind == "evaluation" else loader(kind, source).dataloader
    path = pictures.folder / "train-000000.tar"
    if change == "time":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
        members = (
            (f"s{n}.png", picture(n)) if odd else (f"s{n}.txt", b"7 7\n" * 300) for n in range(24) for odd in (0, 1)
        )
        pictures.tar(path.name, list(members))
    with pytest.raises(ValueError, match=r"train-000000\.tar was replaced or changed after its samples were indexed"):
        list(data)


def test_an_order_does_not_depend_on_when_a_shard_was_written(pictures):
    source = pictures.shards()
    before = loader("webdataset", source).order
    os.utime(pictures.folder / "train-000001.tar", ns=(0, 0))
    assert loader("webdataset", source).order == before
