"""Indexed data: the samples of a step depend on seed, epoch, step and the global batch alone, with whatever ranks and
workers, and an epoch can start at any step."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random

import numpy
import pytest
import torch
from picture_samples import preprocess, tokenizer

from clipup.data import skips, sources
from clipup.data.epoch_order import EpochOrder, GlobalBatches
from clipup.data.loaders import train_loader
from clipup.data.skips import Skips
from clipup.data.sources import ShardSource

KINDS = ("csv", "webdataset", "cached csv", "cached webdataset")
GLOBAL_BATCH = 12
LAYOUTS = [(1, 12, 1), (1, 4, 3), (1, 1, 12), (2, 6, 1), (2, 3, 2), (3, 4, 1), (4, 3, 1), (6, 1, 2)]
"""(world_size, batch_size, accum_freq)"""


def noisy(image):
    """The picture, with random numbers of all three generators below its integer value."""
    noise = torch.rand(()) / 4 + random.random() / 8 + numpy.random.rand() / 8
    return preprocess(image) + noise


def source_of(pictures, kind, count=60, unreadable=()):
    source = pictures.csv(count) if "csv" in kind else pictures.shards(count)
    for n in unreadable:
        if "csv" in kind:
            (pictures.folder / f"{n}.png").write_bytes(b"no picture")
        else:
            pictures.damage_content(n * 4 // count, f"s{n}.png")
    return source


def loader(source, kind, batch_size=4, workers=0, transform=noisy, **options):
    cache = "cached" in kind
    return train_loader(source, transform, tokenizer, batch_size, workers, cache=cache, progress=False, **options)


def batches_of(data, epoch, first_step=0):
    """Of every batch: the pictures with their noise and the captions, one row per sample."""
    data.set_epoch(epoch, first_step)
    return [torch.cat([images[:, 0, 0, :1].double(), texts.double()], 1) for images, texts in data.dataloader]


def steps_of(source, kind, layout, epoch=1, **options):
    """The global batches, joined from those of all ranks."""
    world_size, batch_size, accum_freq = layout
    of_ranks = []
    for rank in range(world_size):
        data = loader(
            source, kind, batch_size, world_size=world_size, rank=rank, accum_freq=accum_freq, seed=5, **options
        )
        batches = batches_of(data, epoch)
        of_ranks.append([batches[i : i + accum_freq] for i in range(0, len(batches), accum_freq)])
    return [torch.cat([batch for of_rank in step for batch in of_rank]) for step in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_samples_in_the_same_order_for_every_number_of_ranks(pictures, kind):
    source = source_of(pictures, kind)
    layouts = LAYOUTS[::3] if "cached" in kind else LAYOUTS
    alone, *others = (steps_of(source, kind, layout) for layout in layouts)
    assert len(alone) == 5 and {len(step) for step in alone} == {GLOBAL_BATCH}
    for steps in others:
        for step, expected in zip(steps, alone, strict=True):
            if "cached" in kind:  # whose noise is drawn while it is filled
                step, expected = step.floor(), expected.floor()
            assert torch.equal(step, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_samples_are_replaced_alike_for_every_number_of_ranks(pictures, kind):
    source = source_of(pictures, kind, unreadable=(0, 7, 8, 21, 30, 31, 59))
    alone, *others = (steps_of(source, kind, layout, max_skipped=0.3) for layout in LAYOUTS[::3])
    assert len(alone) == (4 if "cached" in kind else 5)
    for step in alone:
        assert len({int(sample) for sample in step[:, 0]}) == GLOBAL_BATCH
    for steps in others:
        assert all(torch.equal(step.floor(), expected.floor()) for step, expected in zip(steps, alone, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_any_number_give_the_same_batches(pictures, kind):
    source = source_of(pictures, kind, unreadable=(3, 17))
    expected = [batches_of(loader(source, kind), epoch) for epoch in (0, 1)]
    for workers in (1, 3):
        data = loader(source, kind, workers=workers)
        for epoch in (0, 1):
            for batch, other in zip(batches_of(data, epoch), expected[epoch], strict=True):
                assert torch.equal(batch, other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_starts_at_any_step(pictures, kind, workers):
    source = source_of(pictures, kind, unreadable=(3, 17))
    data = loader(source, kind, workers=workers, accum_freq=2)
    whole = batches_of(data, 1)
    for step in (3, 6, 7, 0):
        rest = batches_of(data, 1, step)
        assert len(rest) == len(whole) - 2 * step
        assert all(torch.equal(batch, other) for batch, other in zip(rest, whole[2 * step :], strict=True))


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_start_within_an_epoch_reads_nothing_again(pictures, kind):
    read = []

    def transform(image):
        read.append(image)
        return preprocess(image)

    data = loader(source_of(pictures, kind), kind, transform=transform)
    assert len(batches_of(data, 0, first_step=12)) == 3
    assert len(read) == 3 * 4


def test_cached_and_other_data_have_the_same_samples_in_the_same_order(pictures):
    for kind in ("csv", "webdataset"):
        source = source_of(pictures, kind)
        plain = steps_of(source, kind, (1, 12, 1), transform=preprocess)
        cached = steps_of(source, f"cached {kind}", (1, 12, 1), transform=preprocess)
        assert all(torch.equal(step, other) for step, other in zip(plain, cached, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 24, 1024, 1025, 5000])
def test_an_order_has_every_row_once(rows):
    order = EpochOrder(rows, seed=3)
    found = order.rows_at(7, numpy.arange(rows))
    assert sorted(found) == list(range(rows))
    part = numpy.arange(rows // 3, rows)
    assert numpy.array_equal(order.rows_at(7, part), found[part])
    if rows > 3:
        assert not numpy.array_equal(order.rows_at(8, numpy.arange(rows)), found)


@pytest.mark.parametrize("rows", [5, 1030])
def test_every_row_is_at_every_place_equally_often(rows):
    """First place and the pair of the first two, over epochs: chi-squared, within five standard deviations."""
    epochs, bins = 1500, 5
    places = numpy.array([EpochOrder(rows, 1).rows_at(epoch, numpy.arange(2)) for epoch in range(epochs)])
    counts = numpy.bincount(places[:, 0] * bins // rows, minlength=bins)
    second = numpy.bincount((places[:, 1] - places[:, 0]) % rows * bins // rows, minlength=bins)
    expected = epochs / bins
    assert ((counts - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5
    if rows > 100:
        assert ((second - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5


def test_the_order_is_that_of_earlier_versions():
    """Runs continue after an update; another order needs another ``epoch_order.RULE``."""
    positions = numpy.arange(6)
    assert EpochOrder(10, 0).rows_at(0, positions).tolist() == [0, 7, 6, 2, 8, 1]
    large = [404701866, 76182925, 116334787, 370656820, 618142785, 229218032]
    assert EpochOrder(10**9, 1).rows_at(2, positions).tolist() == large
    assert EpochOrder(10, 0).seeds(0, positions[:2]).tolist() == [9476934577362572786, 3417920396635165052]


def test_no_two_samples_of_a_batch_share_a_spare():
    batches = GlobalBatches(samples=50, batch_size=4, accum_freq=2)
    firsts = [list(batches.spares(position))[:5] for position in range(16, 24)]
    assert len({spare for spares in firsts for spare in spares}) == 8 * 5
    for position in (0, 17, 49):
        inside = range(position // 8 * 8, position // 8 * 8 + 8)
        assert sorted(batches.spares(position)) == [n for n in range(50) if n not in inside]


def test_an_index_takes_few_bytes_a_sample_in_a_data_worker(pictures):
    source = ShardSource([pictures.shards(200, 1).replace("{000000..000000}", "000000")], Skips())
    assert len(source) == 200
    assert len(pickle.dumps(source)) < 200 * 32 + 1000


@pytest.fixture
def pauses(monkeypatch):
    taken = []
    monkeypatch.setattr(skips, "sleep", taken.append)
    return taken


class Failing:
    """A read of a shard that fails so often."""

    def __init__(self, failures: int, number: int = errno.EIO) -> None:
        self.failures, self.number, self.system = failures, number, sources._content

    def __call__(self, *arguments):
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.system(*arguments)


def test_a_read_that_fails_for_a_moment_is_repeated(pictures, pauses, monkeypatch, caplog):
    source = source_of(pictures, "webdataset")
    expected = batches_of(loader(source, "webdataset"), 0)
    data = loader(source, "webdataset")
    monkeypatch.setattr(sources, "_content", Failing(1))
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(a, b) for a, b in zip(batches_of(data, 0), expected, strict=True))
    assert (data.skipped, data.skips.retries, len(pauses)) == (0, 1, 1)
    assert "again: [Errno 5]" in caplog.text


def test_a_lost_disk_does_not_delay_every_sample(pictures, pauses, monkeypatch):
    data = loader(source_of(pictures, "webdataset"), "webdataset")
    monkeypatch.setattr(sources, "_content", Failing(10**9))
    with pytest.raises(ValueError, match="samples can be read, too few for a batch of 4.*Input/output error"):
        batches_of(data, 0)
    assert len(pauses) == 4


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The shards whose headers are read, with a cache directory in which every index is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_KEPT_FROM_SECONDS", -1)
    read, shards = sources.read_index, []

    def noted(shard, expected):
        shards.append(os.path.basename(shard))
        return read(shard, expected)

    monkeypatch.setattr(sources, "read_index", noted)
    return shards


def test_the_index_of_a_shard_is_read_once(pictures, kept):
    source = source_of(pictures, "webdataset")
    pictures.damage_header(1, "s20.png")
    data = loader(source, "webdataset")
    expected, again = batches_of(data, 0), loader(source, "webdataset")
    assert len(kept) == 4 and (data.skipped, again.skipped) == (1, 1)
    assert all(torch.equal(batch, other) for batch, other in zip(batches_of(again, 0), expected, strict=True))


@pytest.mark.parametrize("change", ["content", "time", "sizes.json", "damaged cache"])
def test_a_kept_index_is_used_only_for_the_state_of_the_shard_that_it_describes(pictures, kept, change):
    source = source_of(pictures, "webdataset")
    loader(source, "webdataset")
    kept.clear()
    path = pictures.folder / "train-000002.tar"
    if change == "content":
        path.write_bytes(path.read_bytes() + bytes(10240))
    elif change == "time":
        os.utime(path, ns=(0, 0))
    elif change == "sizes.json":
        sizes = pictures.folder / "sizes.json"
        sizes.write_text(sizes.read_text().replace('"train-000002.tar": 15', '"train-000002.tar": 16'))
    else:
        for file in (pictures.folder / "cache").rglob("*.npz"):
            file.write_bytes(file.read_bytes()[:100])
    data = loader(source, "webdataset")
    assert set(kept) == ({f"train-00000{n}.tar" for n in range(4)} if change == "damaged cache" else {path.name})
    assert data.skipped == (change == "sizes.json")


def test_without_a_cache_directory_shards_are_indexed_each_time(pictures, kept, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    source = source_of(pictures, "webdataset")
    for _ in range(2):
        assert loader(source, "webdataset").dataloader.num_batches == 15
    assert len(kept) == 8
