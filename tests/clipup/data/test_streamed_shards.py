"""Training batches streamed from shards: those by URL, here file: and pipe:, and resampled ones."""

import logging
import os
from types import SimpleNamespace

import pytest
from picture_samples import epoch_of, load, noisy, pictures_of, preprocess, samples_of, tokenizer

from clipup.data.loaders import train_loader


def stream(pictures, batch_size=3, count=24, **options):
    return load("streamed", pictures.source("streamed", count), batch_size, count=count, **options)


def resampled(source, batch_size=3, **options):
    options = {"workers": 0, "progress": False, **options}
    return train_loader(source, preprocess, tokenizer, batch_size, dataset_resampled=True, **options)


def test_more_samples_than_the_shuffle_buffer_holds_are_each_read_once(pictures, monkeypatch):
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (10, 5))
    seen = pictures_of(stream(pictures, count=240))
    assert sorted(seen) == list(range(240))
    first, last = ({picture // 60 for picture in part} for part in (seen[:40], seen[-40:]))
    assert len(first) == len(last) == 1 and seen[:40] != sorted(seen[:40])


def test_every_worker_of_every_rank_reads_its_own_shards_and_augments_differently(pictures):
    """With one batch per worker, each batch is the shard of one worker."""
    shards, noise = [], set()
    for rank in (0, 1):
        for batch in stream(pictures, 6, workers=2, world_size=2, rank=rank, transform=noisy).dataloader:
            shards.append({picture // 6 for picture, _, _ in samples_of([batch])})
            noise |= set((batch[0][:, 0, 0, 0] % 1).tolist())
    assert sorted(map(sorted, shards)) == [[0], [1], [2], [3]]
    assert len(noise) == 24


def test_an_epoch_ends_with_full_batches_of_another_pass(pictures):
    data = stream(pictures, 16)
    seen = pictures_of(data)
    assert len(seen) == data.dataloader.num_samples == 32
    assert seen[:16] != seen[16:] and set(seen[:16]) != set(seen[16:])
    assert pictures_of(data) == pictures_of(stream(pictures, 16)) == seen
    with pytest.raises(ValueError, match="batch_size: "):
        epoch_of(stream(pictures, 25))


@pytest.mark.parametrize("workers", [0, 2])
def test_resampling_depends_on_seed_epoch_and_rank_alone(pictures, workers, monkeypatch):
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (1, 1))  # samples in the order of the shards
    source = pictures.shards(240, 40)

    def shards(epoch, **options):
        return tuple(picture // 6 for picture in pictures_of(resampled(source, 6, **options), epoch)[::6])

    cases = [{"seed": s, "rank": r, "world_size": 2, "workers": workers} for s in (0, 1) for r in (0, 1)]
    draws = [shards(epoch, **case) for case in cases for epoch in (0, 1)]
    assert len(set(draws)) == len(draws) and {len(drawn) for drawn in draws} == {20}
    continued = resampled(source, 6, **cases[-1])
    assert [tuple(n // 6 for n in pictures_of(continued, epoch)[::6]) for epoch in (0, 1)] == draws[-2:]


@pytest.mark.parametrize("factors, share", [(None, 1 / 4), ("9::1", 3 / 4), ("0.5::3", 1 / 19)])
def test_shards_of_a_source_are_drawn_in_proportion_to_its_factor(pictures, monkeypatch, factors, share):
    monkeypatch.setattr("clipup.data.streamed._SAMPLE_BUFFER", (1, 1))
    pictures.shards()
    source = f"{pictures.folder}/train-000000.tar::{pictures.folder}/train-{{000001..000003}}.tar"
    data = resampled(source, 6, train_num_samples=1800, train_data_upsampling_factors=factors)
    shards = [picture // 6 for picture in pictures_of(data)[::6]]
    assert len(shards) == 300 and shards.count(0) / 300 == pytest.approx(share, abs=0.08)
    others = [shards.count(number) for number in (1, 2, 3)]
    assert max(others) < 2.2 * min(others)
    for wrong in ("2", "1::2::3", "1::0", "1::x", "1::nan"):
        with pytest.raises(ValueError, match="^train_data_upsampling_factors: "):
            resampled(source, 6, train_data_upsampling_factors=wrong)


def flaky(pictures, failures, end="exit 22"):
    """A pipe: that fails ``failures`` times before it delivers a shard of all pictures."""
    pictures.shards(shards=1)
    count, shard = pictures.folder / "count", pictures.folder / "train-000000.tar"
    return f"pipe:echo >> {count}; if [ $(wc -l < {count}) -le {failures} ]; then {end}; fi; cat {shard}"


def piped(source, count=24, **options):
    return load("streamed", source, count=count, dataset_type="webdataset", allow_pipe=True, **options)


def test_opening_a_shard_is_tried_again_with_growing_pauses_at_most_four_times(pictures, pauses, caplog):
    data = piped(flaky(pictures, 3))
    with caplog.at_level(logging.WARNING):
        assert sorted(pictures_of(data)) == list(range(24))
    assert data.skipped == 0 and len(pauses) == 3
    assert all(2**n <= pause <= 3 * 2**n for n, pause in enumerate(pauses))
    assert caplog.text.count("reads pipe:echo") == 3 and "exit 22" in caplog.text
    (pictures.folder / "count").unlink()
    for source, tries, error in (
        (flaky(pictures, 5), 4, "exit 22"),
        (f"file:{pictures.folder}/none.tar", 0, "No such file"),
    ):
        pauses.clear()
        with pytest.raises(ValueError, match=error):
            epoch_of(piped(source))
        assert len(pauses) == tries  # a file that does not exist is not tried again


def test_a_command_that_fails_in_the_middle_loses_only_the_rest(pictures):
    pictures.shards(240, shards=1)
    shard = pictures.folder / "train-000000.tar"
    half = shard.read_bytes().index(b"s120.png")
    data = piped(f"pipe:head -c {half} {shard}; exit 18", 240, max_skipped=1.0)
    seen = set(pictures_of(data))
    assert len(seen) > 60 and seen <= set(range(120))  # webdataset discards what is in the pipe when the command ends
    assert 120 <= data.skipped <= 180


@pytest.fixture
def curl(monkeypatch, tmp_path):
    """A curl that fails; returns its arguments."""
    resolved = SimpleNamespace(repo_id="org/data", path_in_repo="x.tar", repo_type="dataset", revision="main")
    monkeypatch.setattr("huggingface_hub.HfFileSystem.resolve_path", lambda self, path: resolved)
    (tmp_path / "curl").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/told\nexit 22\n')
    (tmp_path / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return lambda: (tmp_path / "told").read_text()


@pytest.mark.parametrize("token", ["hf_secret", None])
def test_a_token_of_the_hub_is_sent_if_there_is_one_and_shown_nowhere(monkeypatch, curl, caplog, token):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    data = train_loader("hf://datasets/org/data/x.tar", preprocess, tokenizer, 2, train_num_samples=4, data_retries=0)
    with pytest.raises(ValueError, match=r"hf://datasets/org/data/x\.tar: exit 22") as error:
        list(data.dataloader)
    assert "https://huggingface.co/datasets/org/data/resolve/main/x.tar" in curl()
    assert ("Authorization:Bearer hf_secret" in curl()) == (token is not None) and "None" not in curl()
    assert "hf_secret" not in caplog.text + str(error.value)
