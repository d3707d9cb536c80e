"""Training batches from WebDataset shards, from CSV and from memory."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import subprocess
import sys
import tarfile

import pytest
import torch
from picture_samples import preprocess, samples_of, tokenizer
from strangers import MakesFile

import clipup.data
from clipup.data import in_memory, skips
from clipup.data.loaders import DataOptions, load_train_data, train_loader

KINDS = ("webdataset", "csv", "cached webdataset", "cached csv")


def loader(pictures, kind: str, batch_size: int = 3, workers: int = 0, **options):
    source = options.pop("source", None) or (pictures.csv() if "csv" in kind else pictures.shards())
    return train_loader(
        source, preprocess, tokenizer, batch_size, workers, cache="cached" in kind, progress=False, **options
    )


def epoch_of(data, epoch: int):
    data.set_epoch(epoch)
    return samples_of(data.dataloader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_sample_once_with_one_of_its_own_captions(pictures, kind, workers):
    data = loader(pictures, kind, workers=workers)
    seen = epoch_of(data, 0)
    assert sorted(picture for picture, _, _ in seen) == list(range(24))
    assert all(picture == caption and variant in (0, 1, 2) for picture, caption, variant in seen)
    assert [picture for picture, _, _ in seen] != list(range(24))
    assert data.skipped == 0
    assert (data.dataloader.num_samples, data.dataloader.num_batches) == (24, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_all_captions_of_an_image_are_drawn_over_many_epochs(pictures, kind):
    data = loader(pictures, kind)
    drawn = {(caption, variant) for epoch in range(40) for _, caption, variant in epoch_of(data, epoch)}
    assert drawn == {(caption, variant) for caption in range(24) for variant in range(3)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_on_seed_and_epoch(pictures, kind, workers):
    first = loader(pictures, kind, workers=workers, seed=1)
    again = loader(pictures, kind, workers=workers, seed=1)
    epochs = [epoch_of(first, epoch) for epoch in (0, 1)]
    assert [epoch_of(again, epoch) for epoch in (0, 1)] == epochs
    assert epochs[0] != epochs[1]
    assert epoch_of(loader(pictures, kind, workers=workers, seed=2), 0) != epochs[0]
    assert epoch_of(loader(pictures, kind, workers=workers, seed=1, epoch=1), 1) == epochs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_does_not_change_the_random_state_of_training(pictures, kind):
    before = torch.random.get_rng_state()
    list(loader(pictures, kind).dataloader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cached_batches_have_the_types_of_preprocess_and_tokenizer(pictures):
    images, tokens = next(iter(loader(pictures, "cached webdataset", batch_size=24).dataloader))
    assert images.shape == (24, 3, 4, 4) and images.dtype == torch.float32
    assert tokens.shape == (24, 2) and tokens.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_data_and_see_equally_many_batches(pictures, kind):
    ranks = [loader(pictures, kind, world_size=2, rank=rank) for rank in (0, 1)]
    seen = [epoch_of(data, 3) for data in ranks]
    assert len(seen[0]) == len(seen[1]) == 12
    assert sorted(picture for rank in seen for picture, _, _ in rank) == list(range(24))
    assert len({data.dataloader.num_batches for data in ranks}) == 1


def test_a_rank_with_fewer_readable_samples_serves_as_many_batches_as_the_others(pictures):
    source = pictures.shards()
    for member in ("s0.png", "s2.png", "s4.png"):
        pictures.damage_content(0, member)
    ranks = [
        loader(pictures, "cached webdataset", source=source, world_size=2, rank=rank, max_skipped=0.3)
        for rank in (0, 1)
    ]
    assert [len(epoch_of(data, 0)) for data in ranks] == [12, 12]
    assert [data.skipped for data in ranks] == [3, 0]


def test_a_directory_stands_for_its_training_shards(small):
    out, dataset = small

    def tokens(texts):
        return torch.tensor([[len(text)] for text in texts])

    data = train_loader(out, preprocess, tokens, 16, 0, cache=True, progress=False)
    assert data.dataloader.num_batches == dataset["splits"]["train"]["images"] // 16
    images, texts = next(iter(data.dataloader))
    assert images.shape == (16, 3, 32, 32) and len(texts) == 16


def test_shards_are_found_by_different_patterns(pictures):
    pictures.shards()
    folder = pictures.folder
    for source in (f"{folder}/train-*.tar", f"{folder}/train-00000[0-1].tar::{folder}/train-{{000002,000003}}.tar"):
        assert len(epoch_of(loader(pictures, "webdataset", source=source), 0)) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffling_mixes_the_samples_of_different_shards(pictures, workers):
    data = loader(pictures, "webdataset", batch_size=6, workers=workers)
    for batch in data.dataloader:
        assert len({picture // 6 for picture, _, _ in samples_of([batch])}) > 1


def test_more_samples_than_the_shuffle_buffer_holds_are_each_read_once(pictures, monkeypatch):
    monkeypatch.setattr("clipup.data.webdataset_pipeline._SAMPLE_BUFFER", (10, 5))
    seen = [picture for picture, _, _ in epoch_of(loader(pictures, "webdataset", source=pictures.shards(240)), 0)]
    assert sorted(seen) == list(range(240))
    first, last = ({picture // 60 for picture in part} for part in (seen[:40], seen[-40:]))
    assert len(first) == len(last) == 1 and seen[:40] != sorted(seen[:40])


def test_every_worker_of_every_rank_reads_its_own_shards(pictures):
    """With one batch per worker, each batch is the shard of one worker."""
    shards = []
    for rank in (0, 1):
        data = loader(pictures, "webdataset", batch_size=6, workers=2, world_size=2, rank=rank)
        shards += [{picture // 6 for picture, _, _ in samples_of([batch])} for batch in data.dataloader]
    assert sorted(map(sorted, shards)) == [[0], [1], [2], [3]]


def with_noise(image):
    """The picture with random noise below its integer value."""
    return preprocess(image) + torch.rand(()) / 2


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_ranks_augment_differently(pictures, kind):
    source = pictures.csv() if kind == "csv" else pictures.shards()
    noise = []
    for rank in (0, 1):
        data = train_loader(source, with_noise, tokenizer, 3, 1, world_size=2, rank=rank)
        noise.append(torch.cat([images[:, 0, 0, 0] % 1 for images, _ in data.dataloader]))
    assert not torch.isclose(*noise).any()


def test_shards_that_do_not_divide_into_full_batches_start_over(pictures):
    data = loader(pictures, "webdataset", batch_size=5)
    seen = epoch_of(data, 0)
    assert len(seen) == 25 and data.dataloader.num_samples == 25
    assert len({picture for picture, _, _ in seen}) >= 20


def test_resampling_draws_shards_and_keeps_the_length_of_an_epoch(pictures):
    data = loader(pictures, "webdataset", dataset_resampled=True)
    seen = epoch_of(data, 0)
    assert len(seen) == 24
    assert all(picture == caption for picture, caption, _ in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_resampling_depends_on_seed_epoch_and_rank_alone(pictures, workers, monkeypatch):
    monkeypatch.setattr("clipup.data.webdataset_pipeline._SAMPLE_BUFFER", (1, 1))  # samples in the order of the shards
    source = pictures.shards(240, 40)

    def data(seed, rank):
        options = {"dataset_resampled": True, "workers": workers, "world_size": 2, "batch_size": 6}
        return loader(pictures, "webdataset", source=source, seed=seed, rank=rank, **options)

    def shards(data, epoch):
        return tuple(picture // 6 for picture, _, _ in epoch_of(data, epoch)[::6])

    cases = [(seed, epoch, rank) for seed in (0, 1) for epoch in (0, 1) for rank in (0, 1)]
    draws = {(seed, epoch, rank): shards(data(seed, rank), epoch) for seed, epoch, rank in cases}
    assert len(set(draws.values())) == len(cases)
    continued = data(seed=1, rank=1)
    assert [shards(continued, epoch) for epoch in (0, 1)] == [draws[1, 0, 1], draws[1, 1, 1]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset"])
def test_unreadable_samples_of_a_shard_are_skipped_and_counted(pictures, kind, workers, caplog):
    source = pictures.shards()
    pictures.damage_content(0, "s1.png")
    pictures.damage_header(1, "s8.png")
    pictures.damage_header(2, "s14.txt")
    with caplog.at_level(logging.WARNING):
        data = loader(pictures, kind, source=source, workers=workers, batch_size=1, max_skipped=0.2)
        for epoch in (0, 1):
            seen = {picture for picture, _, _ in epoch_of(data, epoch)}
            assert seen == set(range(24)) - {1, 8, 14}
            assert data.skipped == 3
    for name, reason in (("s1", "it is not an image"), ("s8", "it has no image"), ("s14", "it has no caption")):
        (line,) = [line for line in caplog.messages if f"skipped {name} in" in line]
        assert reason in line


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset"])
def test_a_pickle_beside_an_image_is_not_executed(pictures, picture, kind, tmp_path):
    trace = tmp_path / "executed"
    code = pickle.dumps(MakesFile(trace))
    shard = pictures.tar("train.tar", [("a.png", picture(1)), ("a.txt", b"1 0"), ("a.pyd", code)])
    size = {} if "cached" in kind else {"train_num_samples": 1}
    assert epoch_of(loader(pictures, kind, batch_size=1, source=str(shard), **size), 0) == [(1, 1, 0)]
    assert not trace.exists()
    pickle.loads(code)
    assert trace.exists()


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset"])
def test_a_truncated_shard_loses_only_its_rest(pictures, kind):
    source = pictures.shards()
    path = pictures.folder / "train-000003.tar"
    with tarfile.open(path) as tar:
        middle = tar.getmember("s21.png").offset_data + 20
    path.write_bytes(path.read_bytes()[:middle])
    (pictures.folder / "train-000000.tar").write_bytes(b"no tar file" * 100)
    data = loader(pictures, kind, source=source, batch_size=1, max_skipped=0.5)
    assert {picture for picture, _, _ in epoch_of(data, 0)} == set(range(6, 21))
    assert data.skipped == 9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_unreadable_rows_of_a_csv_are_skipped_and_counted(pictures, kind, workers):
    source = pictures.csv()
    (pictures.folder / "5.png").write_bytes(b"no picture")
    (pictures.folder / "23.png").unlink()
    with open(source, "a") as file:
        file.write(f"{pictures.folder / '1.png'}\t\n")
    data = loader(pictures, kind, source=source, workers=workers, batch_size=1, max_skipped=0.2)
    for epoch in (0, 1):
        assert {picture for picture, _, _ in epoch_of(data, epoch)} == set(range(24)) - {5, 23}
        assert data.skipped == 3


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_any_readable_sample_is_an_error_and_does_not_loop(pictures, kind, monkeypatch):
    monkeypatch.setattr(skips, "GIVE_UP_AFTER", 100)
    source = pictures.csv() if "csv" in kind else pictures.shards()
    for n in range(24):
        if "csv" in kind:
            (pictures.folder / f"{n}.png").write_bytes(b"no picture")
        else:
            pictures.damage_content(n // 6, f"s{n}.png")
    with pytest.raises(ValueError, match="can be read|could not be read|readable samples"):
        list(loader(pictures, kind, source=source, max_skipped=1.0).dataloader)


def test_resampling_stops_when_nothing_can_be_read(pictures, monkeypatch):
    monkeypatch.setattr(skips, "GIVE_UP_AFTER", 100)
    source = pictures.shards()
    for n in range(24):
        pictures.damage_content(n // 6, f"s{n}.png")
    with pytest.raises(ValueError, match="100 samples in a row could not be read"):
        list(loader(pictures, "webdataset", source=source, dataset_resampled=True).dataloader)


def test_a_batch_larger_than_the_shards_of_a_worker_is_an_error(pictures):
    with pytest.raises(ValueError, match="batch_size: the shards of one worker hold fewer than 25 readable samples"):
        list(loader(pictures, "webdataset", batch_size=25).dataloader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"workers": -1}, "workers: got -1, expected 0"),
        ({"workers": 5}, r"workers: 5 in each of 1 processes, but train_data has 4 shards .* at most 4 workers"),
        ({"workers": 2, "world_size": 3}, "at most 1 workers"),
        ({"world_size": 2, "rank": 2}, "rank: got 2 for world_size 2, expected 0 to 1"),
        ({"dataset_type": "parquet"}, "dataset_type: got 'parquet', expected 'auto', 'webdataset' or 'csv'"),
        ({"train_num_samples": 0}, "train_data: got 0 samples, the data set is empty"),
        ({"cache": True, "train_num_samples": 5}, "train_num_samples: has no effect with cache"),
        ({"cache": True, "dataset_resampled": True}, "dataset_resampled: has no effect with cache"),
        ({"cache": True, "batch_size": 25}, "batch_size: got 25 for 1 processes, but there are 24 samples"),
    ],
)
def test_wrong_options_are_refused_by_name(pictures, options, message):
    options = {"batch_size": 3, "workers": 0} | options
    with pytest.raises(ValueError, match=message):
        train_loader(pictures.shards(), preprocess, tokenizer, progress=False, **options)


def test_missing_data_are_named(pictures):
    pictures.shards()
    folder = pictures.folder
    for source in (f"{folder}/nothing-*.tar", f"{folder}/train-{{000000..000009}}.tar", f"{folder}/none.tar"):
        for cached in (False, True):
            with pytest.raises(FileNotFoundError, match="train_data: no shard .*: build the data first"):
                train_loader(source, preprocess, tokenizer, 3, 0, cache=cached)
    with pytest.raises(FileNotFoundError, match="train_data: there is no file .*none.csv"):
        train_loader(f"{folder}/none.csv", preprocess, tokenizer, 3)
    with pytest.raises(
        ValueError, match=r"train_data: .* is a directory: name the shards of one split, such as .*\.tar"
    ):
        train_loader(folder, preprocess, tokenizer, 3)
    with pytest.raises(ValueError, match="train_data: cannot tell the format of .* set dataset_type"):
        train_loader("images.parquet", preprocess, tokenizer, 3)
    with pytest.raises(FileNotFoundError, match="names no shard"):
        train_loader("", preprocess, tokenizer, 3, dataset_type="webdataset")


def test_the_number_of_samples_is_found_or_required(pictures):
    source = pictures.shards()
    sizes = pictures.folder / "sizes.json"
    sizes.write_text('{"train-000000.tar": 6}')
    with pytest.raises(ValueError, match="does not list train-000001.tar: pass the number of samples per epoch"):
        loader(pictures, "webdataset", source=source)
    sizes.unlink()
    with pytest.raises(ValueError, match="train_num_samples: not given, and neither sizes.json nor __len__"):
        loader(pictures, "webdataset", source=source)
    assert loader(pictures, "webdataset", source=source, train_num_samples=12).dataloader.num_batches == 4
    (pictures.folder / "__len__").write_text("24")
    assert loader(pictures, "webdataset", source=source).dataloader.num_batches == 8


def test_a_wrong_csv_says_which_column_is_missing(pictures):
    source = pictures.csv(separator=",")
    for cached in (False, True):
        with pytest.raises(ValueError, match=r"csv_img_key: .* has no column 'filepath'.*csv_separator \(now '\\t'\)"):
            train_loader(source, preprocess, tokenizer, 3, cache=cached)
        with pytest.raises(ValueError, match="csv_caption_key: .* has no column 'text', its columns are"):
            train_loader(source, preprocess, tokenizer, 3, csv_separator=",", csv_caption_key="text", cache=cached)
    assert train_loader(source, preprocess, tokenizer, 3, csv_separator=",").dataloader.num_batches == 8
    for content, message in (("", "is empty"), ("filepath\ttitle\n", "has no rows|holds no sample")):
        (pictures.folder / "train.csv").write_text(content)
        for cached in (False, True):
            with pytest.raises(ValueError, match=f"train_data: .*({message})"):
                train_loader(source, preprocess, tokenizer, 3, 0, cache=cached)
    with pytest.raises(ValueError, match="batch_size: got 25, but .* has 24 readable rows"):
        loader(pictures, "csv", batch_size=25)


def test_a_cache_needs_a_preprocess_that_returns_tensors(pictures):
    with pytest.raises(TypeError, match="preprocess: returned Image for s0 in .*, expected a tensor"):
        train_loader(pictures.shards(), lambda image: image, tokenizer, 3, 0, cache=True, progress=False)


def test_empty_shards_are_an_empty_data_set(pictures):
    pictures.tar("train-000000.tar", [])
    (pictures.folder / "sizes.json").write_text('{"train-000000.tar": 0}')
    for cached in (False, True):
        with pytest.raises(ValueError, match="train_data: .*(empty|holds no sample)"):
            train_loader(pictures.folder / "train-000000.tar", preprocess, tokenizer, 3, 0, cache=cached)


def test_a_cache_that_does_not_fit_is_refused_before_reading(pictures, monkeypatch):
    monkeypatch.setattr(in_memory.os, "sysconf", lambda name: 64)
    with pytest.raises(ValueError, match=r"cache: 24 images of 3 x 4 x 4 take .* more than half of"):
        loader(pictures, "cached webdataset")


def test_only_local_files_are_cached():
    with pytest.raises(ValueError, match="train_data: https://host/a.tar is not a local file"):
        train_loader("https://host/a.tar", preprocess, tokenizer, 3, cache=True)


def test_the_options_of_a_loader_can_be_one_object(pictures):
    source = pictures.csv(separator=",")
    options = DataOptions(train_data=source, batch_size=3, workers=0, csv_separator=",", seed=5)
    by_object = load_train_data(options, preprocess, tokenizer)
    by_keyword = train_loader(source, preprocess, tokenizer, 3, 0, 5, csv_separator=",")
    assert samples_of(by_object.dataloader) == samples_of(by_keyword.dataloader)
    with pytest.raises(TypeError, match="csv_seperator"):
        train_loader(source, preprocess, tokenizer, 3, csv_seperator=",")


def test_a_csv_file_is_read_without_webdataset(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "clipup.data.webdataset_pipeline", raising=False)
    monkeypatch.delattr(clipup.data, "webdataset_pipeline", raising=False)
    assert len(epoch_of(loader(pictures, "csv"), 0)) == len(epoch_of(loader(pictures, "cached csv"), 0)) == 24


def test_a_missing_package_is_named_with_the_extra_to_install(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "clipup.data.webdataset_pipeline", raising=False)
    monkeypatch.delattr(clipup.data, "webdataset_pipeline", raising=False)
    with pytest.raises(
        ImportError, match=r'needs the package webdataset, which is not installed: pip install "clipup\[train\]"'
    ):
        train_loader(pictures.shards(), preprocess, tokenizer, 3)


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_a_program_ends_while_its_data_workers_are_alive(pictures, kind):
    source = pictures.csv() if kind == "csv" else pictures.shards()
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from picture_samples import preprocess, tokenizer
from clipup.data.loaders import train_loader
batches = iter(train_loader({source!r}, preprocess, tokenizer, 3, 1).dataloader)
next(batches)
itself = [batches]
itself.append(itself)  # freed by the garbage collector alone, after the program's exit functions
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_workers_end_with_an_error_and_the_data_can_be_read_again(pictures, kind):
    source, before = pictures.csv() if kind == "csv" else pictures.shards(), set(multiprocessing.active_children())
    repaired = pictures.folder / "repaired"
    change = lambda image: preprocess(image) if repaired.exists() else image  # noqa: E731
    data = train_loader(source, change, tokenizer, 3, workers=1).dataloader
    with pytest.raises(TypeError) as kept:
        list(data)
    assert kept.value and set(multiprocessing.active_children()) <= before
    repaired.touch()
    assert len(list(data)) == len(data)
    del kept, data  # without waiting for the garbage collector
    assert set(multiprocessing.active_children()) <= before
