"""Training batches streamed from shards: those by URL, here file:, and resampled ones."""

from __future__ import annotations

import logging
import sys

import pytest
from picture_samples import preprocess, samples_of, tokenizer

import clipup.data
from clipup.data import skips
from clipup.data.loaders import train_loader


def loader(pictures, batch_size: int = 3, workers: int = 0, source: str | None = None, **options):
    source = f"file:{source or pictures.shards()}"
    options = {"train_num_samples": 24, **options}
    return train_loader(source, preprocess, tokenizer, batch_size, workers, progress=False, **options)


def resampled(pictures, source: str | None = None, batch_size: int = 3, **options):
    source = source or pictures.shards()
    return train_loader(source, preprocess, tokenizer, batch_size, dataset_resampled=True, **{"workers": 0, **options})


def epoch_of(data, epoch: int):
    data.set_epoch(epoch)
    return samples_of(data.dataloader)


def test_more_samples_than_the_shuffle_buffer_holds_are_each_read_once(pictures, monkeypatch):
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (10, 5))
    data = loader(pictures, source=pictures.shards(240), train_num_samples=240)
    seen = [picture for picture, _, _ in epoch_of(data, 0)]
    assert sorted(seen) == list(range(240))
    first, last = ({picture // 60 for picture in part} for part in (seen[:40], seen[-40:]))
    assert len(first) == len(last) == 1 and seen[:40] != sorted(seen[:40])


def test_every_worker_of_every_rank_reads_its_own_shards(pictures):
    """With one batch per worker, each batch is the shard of one worker."""
    shards = []
    for rank in (0, 1):
        data = loader(pictures, batch_size=6, workers=2, world_size=2, rank=rank)
        shards += [{picture // 6 for picture, _, _ in samples_of([batch])} for batch in data.dataloader]
    assert sorted(map(sorted, shards)) == [[0], [1], [2], [3]]


def test_shards_that_do_not_divide_into_full_batches_start_over(pictures):
    data = loader(pictures, batch_size=5)
    seen = epoch_of(data, 0)
    assert len(seen) == 25 and data.dataloader.num_samples == 25
    assert len({picture for picture, _, _ in seen}) >= 20


def test_a_second_pass_through_the_shards_has_another_order_and_other_samples(pictures):
    data = loader(pictures, batch_size=16)
    first, second = (
        [picture for picture, _, _ in part] for epoch in [epoch_of(data, 0)] for part in (epoch[:16], epoch[16:])
    )
    assert first != second and set(first) != set(second)
    assert epoch_of(data, 0) == epoch_of(loader(pictures, batch_size=16), 0)


def test_epochs_of_neighbouring_seeds_have_different_orders(pictures):
    orders = {
        tuple(picture for picture, _, _ in epoch_of(loader(pictures, seed=seed), epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("workers, warned", [(0, False), (2, False), (3, True)])
def test_shards_that_do_not_divide_among_workers_are_a_warning(pictures, workers, warned, caplog):
    loader(pictures, workers=workers)
    loader(pictures, workers=workers, source=pictures.shards(60, 30 * max(1, workers) + 1), train_num_samples=60)
    resampled(pictures, workers=3)
    messages = [line for line in caplog.messages if "serve some samples twice" in line]
    assert len(messages) == warned
    assert not warned or "4 shards for 3 data workers in all" in messages[0]


def test_resampling_draws_shards_and_keeps_the_length_of_an_epoch(pictures):
    data = resampled(pictures)
    seen = epoch_of(data, 0)
    assert len(seen) == 24
    assert all(picture == caption for picture, caption, _ in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_resampling_depends_on_seed_epoch_and_rank_alone(pictures, workers, monkeypatch):
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (1, 1))  # samples in the order of the shards
    source = pictures.shards(240, 40)

    def data(seed, rank):
        return resampled(pictures, source, 6, workers=workers, world_size=2, seed=seed, rank=rank)

    def shards(data, epoch):
        return tuple(picture // 6 for picture, _, _ in epoch_of(data, epoch)[::6])

    cases = [(seed, epoch, rank) for seed in (0, 1) for epoch in (0, 1) for rank in (0, 1)]
    draws = {(seed, epoch, rank): shards(data(seed, rank), epoch) for seed, epoch, rank in cases}
    assert len(set(draws.values())) == len(cases)
    continued = data(seed=1, rank=1)
    assert [shards(continued, epoch) for epoch in (0, 1)] == [draws[1, 0, 1], draws[1, 1, 1]]


def test_resampling_stops_when_nothing_can_be_read(pictures, monkeypatch):
    monkeypatch.setattr(skips, "GIVE_UP_AFTER", 100)
    source = pictures.shards()
    for n in range(24):
        pictures.damage_content(n // 6, f"s{n}.png")
    with pytest.raises(ValueError, match="100 samples in a row could not be read"):
        list(resampled(pictures, source).dataloader)


def test_a_batch_larger_than_the_shards_of_a_worker_is_an_error(pictures):
    with pytest.raises(ValueError, match="batch_size: the shards of one worker hold fewer than 25 readable samples"):
        list(loader(pictures, batch_size=25).dataloader)


def test_a_missing_package_is_named_with_the_extra_to_install(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "clipup.data.streamed", raising=False)
    monkeypatch.delattr(clipup.data, "streamed", raising=False)
    with pytest.raises(
        ImportError, match=r"needs the package webdataset, which is not installed; clipup.s extra .train. has it"
    ):
        loader(pictures)


def test_the_number_of_samples_is_found_or_required(pictures):
    """Here of resampled local shards; nothing can lie beside a URL."""
    source = pictures.shards()
    sizes = pictures.folder / "sizes.json"
    sizes.write_text('{"train-000000.tar": 6}')
    with pytest.raises(ValueError, match="train_num_samples: not given"):
        resampled(pictures, source)
    sizes.unlink()
    with pytest.raises(ValueError, match="train_num_samples: not given, and neither sizes.json nor __len__"):
        resampled(pictures, source)
    with pytest.raises(ValueError, match="train_num_samples: not given"):
        loader(pictures, source=source, train_num_samples=None)
    assert resampled(pictures, source, train_num_samples=12).dataloader.num_batches == 4
    (pictures.folder / "__len__").write_text("24")
    assert resampled(pictures, source).dataloader.num_batches == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 5}, r"workers: 5 in each of 1 processes, but train_data has 4 shards .* at most 4 workers"),
        ({"workers": 2, "world_size": 3}, "at most 1 workers"),
    ],
)
def test_every_worker_needs_a_shard(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        loader(pictures, **options)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which take no time."""
    taken = []
    monkeypatch.setattr(skips, "sleep", taken.append)
    return taken


def flaky(pictures, failures: int, end: str = "exit 22") -> str:
    """A command that fails so often before it delivers the samples."""
    pictures.shards(shards=1)
    count, shard = pictures.folder / "tries", pictures.folder / "train-000000.tar"
    return f"pipe:echo >> {count}; if [ $(wc -l < {count}) -le {failures} ]; then {end}; fi; cat {shard}"


def piped(source, **options):
    options = {"dataset_type": "webdataset", "train_num_samples": 24, "allow_pipe": True, **options}
    return train_loader(source, preprocess, tokenizer, 3, 0, **options)


def test_opening_a_shard_is_tried_again_with_growing_pauses(pictures, pauses, caplog):
    data = piped(flaky(pictures, 3))
    with caplog.at_level(logging.WARNING):
        seen = epoch_of(data, 0)
    assert sorted(picture for picture, _, _ in seen) == list(range(24))
    assert (data.skipped, data.skips.retries) == (0, 3)
    assert all(2**n <= pause <= 3 * 2**n for n, pause in enumerate(pauses)) and len(pauses) == 3
    assert caplog.text.count("reads pipe:echo") == 3 and "exit 22" in caplog.text


def test_tries_to_open_a_shard_are_bounded(pictures, pauses):
    source = flaky(pictures, 5)
    with pytest.raises(ValueError, match="fewer than 3 readable samples.*cannot be opened.*exit 22"):
        epoch_of(piped(source), 0)
    assert len(pauses) == 4 and sum(pauses) <= 45


def test_a_file_that_does_not_exist_is_not_tried_again(pictures, pauses):
    with pytest.raises(ValueError, match="cannot be opened .*No such file"):
        list(loader(pictures, source=str(pictures.folder / "none.tar")).dataloader)
    assert pauses == []


def test_a_command_that_fails_in_the_middle_loses_only_the_rest(pictures):
    pictures.shards(240, shards=1)
    shard = pictures.folder / "train-000000.tar"
    half = shard.read_bytes().index(b"s120.png")
    data = piped(f"pipe:head -c {half} {shard}; exit 18", max_skipped=1.0, train_num_samples=240)
    seen = {picture for picture, _, _ in epoch_of(data, 0)}
    assert len(seen) > 60 and seen <= set(range(120))  # webdataset discards what is in the pipe when the command ends
    assert 120 <= data.skipped <= 180
