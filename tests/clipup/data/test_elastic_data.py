"""Indexed data: the samples of a step depend on seed, epoch, step and the global batch alone, with whatever ranks and
workers, and an epoch can start at any step."""

import os

import numpy
import pytest
import torch
from picture_samples import load, noisy, preprocess

from clipup.data import shards
from clipup.data.epoch_order import EpochOrder

KINDS = ("csv", "webdataset", "cached csv", "cached webdataset")
GLOBAL_BATCH = 12
LAYOUTS = [(1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 4, 1)]
"""(world_size, batch_size, accum_freq)"""
SPOILT = (0, 7, 8, 21, 30, 31, 59)


def batches_of(data, epoch, first_step=0):
    """Of every batch: the pictures with their noise and the captions, one row per sample."""
    data.set_epoch(epoch, first_step)
    return [torch.cat([images[:, 0, 0, :1].double(), texts.double()], 1) for images, texts in data.dataloader]


def steps_of(source, kind, layout, **options):
    """The global batches, joined from those of all ranks."""
    world_size, batch_size, accum_freq = layout
    of_ranks = []
    options = {"transform": noisy, "world_size": world_size, "accum_freq": accum_freq, "seed": 5, **options}
    for rank in range(world_size):
        batches = batches_of(load(kind, source, batch_size, rank=rank, **options), 1)
        of_ranks.append([batches[i : i + accum_freq] for i in range(0, len(batches), accum_freq)])
    return [torch.cat([batch for of_rank in step for batch in of_rank]) for step in zip(*of_ranks, strict=True)]


def alike(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.mark.parametrize("spoilt", [(), SPOILT])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_samples_in_the_same_order_for_every_number_of_ranks(pictures, kind, spoilt):
    """Those that cannot be read are replaced, by no other of the step."""
    source = pictures.source(kind, 60, spoilt)
    layouts = LAYOUTS[::2] if "cached" in kind else LAYOUTS
    alone, *others = (steps_of(source, kind, layout, max_skipped=0.3) for layout in layouts)
    if "cached" in kind:  # whose noise is drawn while it is filled
        alone, others = [step.floor() for step in alone], [[step.floor() for step in steps] for steps in others]
    assert len(alone) == (4 if "cached" in kind and spoilt else 5)
    assert {len(set(step[:, 0].int().tolist())) for step in alone} == {GLOBAL_BATCH}
    assert all(alike(steps, alone) for steps in others)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_any_number_give_the_same_batches_from_any_step_on(pictures, kind):
    source = pictures.source(kind, 60, (3, 17))
    data = load(kind, source, 4, transform=noisy, accum_freq=2)
    expected = [batches_of(data, epoch) for epoch in (0, 1)]
    other = load(kind, source, 4, 2, transform=noisy, accum_freq=2)
    assert alike(batches_of(other, 0), expected[0])
    for step in (3, 6, 7, 0):
        assert alike(batches_of(other, 1, step), expected[1][2 * step :])
        assert alike(batches_of(data, 1, step), expected[1][2 * step :])


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_its_own_augmentation(pictures, kind):
    batches = batches_of(load(kind, pictures.source(kind, 24), 4, transform=noisy), 0)
    noise = torch.cat(batches)[:, 0] % 1
    assert len(noise) == len(noise.unique()) == 24


def test_a_start_within_an_epoch_reads_nothing_again(pictures):
    read = []
    data = load("csv", pictures.csv(60), 4, transform=lambda image: read.append(image) or preprocess(image))
    assert len(batches_of(data, 0, first_step=12)) == 3
    assert len(read) == 3 * 4


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_cached_and_other_data_have_the_same_samples_in_the_same_order(pictures, kind):
    source = pictures.source(kind, 60)
    plain, cached = (steps_of(source, which, LAYOUTS[0], transform=preprocess) for which in (kind, f"cached {kind}"))
    assert alike(plain, cached)


@pytest.mark.parametrize("rows", [1, 2, 3, 24, 1024, 1025, 5000])
def test_an_order_has_every_row_once(rows):
    order = EpochOrder(rows, seed=3)
    whole, part = order.rows_at(7, numpy.arange(rows)), numpy.arange(rows // 3, rows)
    assert sorted(whole) == list(range(rows)) and numpy.array_equal(order.rows_at(7, part), whole[part])
    assert rows <= 3 or not numpy.array_equal(order.rows_at(8, numpy.arange(rows)), whole)


@pytest.mark.parametrize("rows", [5, 1030])
def test_every_row_is_at_every_place_equally_often(rows):
    """The first place, over epochs: chi-squared, within five standard deviations."""
    epochs, bins = 1500, 5
    places = numpy.array([EpochOrder(rows, 1).rows_at(epoch, numpy.arange(2)) for epoch in range(epochs)])
    counts = numpy.bincount(places[:, 0] * bins // rows, minlength=bins)
    expected = epochs / bins
    assert ((counts - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The shards whose headers are read, with a cache directory in which every index is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "_KEPT_FROM_SECONDS", -1)
    read, names = shards._read, []
    noted = lambda shard, expected: names.append(os.path.basename(shard)) or read(shard, expected)  # noqa: E731
    monkeypatch.setattr(shards, "_read", noted)
    return names


@pytest.mark.parametrize("change", ["", "content", "time", "sizes.json", "damaged cache", "no cache"])
def test_a_kept_index_is_used_only_for_the_state_of_the_shard_that_it_describes(pictures, kept, change, monkeypatch):
    source = pictures.shards(60)
    pictures.damage(1, "s29.png", header=True)
    if change == "no cache":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    expected = batches_of(load("webdataset", source), 0)
    kept.clear()
    path, sizes = pictures.folder / "train-000002.tar", pictures.folder / "sizes.json"
    if change == "content":
        path.write_bytes(path.read_bytes() + bytes(10240))
    elif change == "time":
        os.utime(path, ns=(0, 0))
    elif change == "sizes.json":
        sizes.write_text(sizes.read_text().replace('"train-000002.tar": 15', '"train-000002.tar": 16'))
    elif change == "damaged cache":
        for file in (pictures.folder / "cache").rglob("*.npz"):
            file.write_bytes(file.read_bytes()[:100])
    data = load("webdataset", source)
    every = [f"train-00000{n}.tar" for n in range(4)]
    assert kept == ([] if not change else every if "cache" in change else [path.name])
    assert data.skipped == 1 + (change == "sizes.json")
    assert alike(batches_of(data, 0), expected)
