"""Training batches from WebDataset shards, from CSV and from memory."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from picture_samples import preprocess, samples_of, tokenizer
from strangers import MakesFile

import clipup.data
from clipup.data import indexed, skips
from clipup.data.loaders import DataOptions, load_train_data, train_loader

KINDS = ("webdataset", "csv", "cached webdataset", "cached csv", "streamed")


def source_of(pictures, kind: str) -> str:
    """Written once: shards may not change while they are read."""
    if (pictures.folder / "sizes.json").exists() and "csv" not in kind:
        return str(pictures.folder / "train-{000000..000003}.tar")
    return pictures.csv() if "csv" in kind else pictures.shards()


def loader(pictures, kind: str, batch_size: int = 3, workers: int = 0, **options):
    source = options.pop("source", None) or source_of(pictures, kind)
    if kind == "streamed":
        source, options = f"file:{source}", {"train_num_samples": 24, **options}
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


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "streamed"])
def test_all_captions_of_an_image_are_drawn_over_many_epochs(pictures, kind):
    data = loader(pictures, kind)
    drawn = {(caption, variant) for epoch in range(40) for _, caption, variant in epoch_of(data, epoch)}
    assert drawn == {(caption, variant) for caption in range(24) for variant in range(3)}


BREAKS = "red cat\nblue dog\r\nhouse\x85of\u2028two\x0bor\x1cmore\rlines"


@pytest.mark.parametrize("member", ["txt", "json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_of_several_lines_is_one(pictures, picture, kind, member, caplog):
    """A CSV cell, a txt as in open_clip, and a caption of a json. Of such a txt one line of the log says so."""
    if "csv" in kind:
        (pictures.folder / "0.png").write_bytes(picture(0))
        source = pictures.folder / "lines.csv"
        source.write_bytes(f'filepath\ttitle\n{pictures.folder}/0.png\t"{BREAKS}"\n'.encode())
    else:
        text = BREAKS.encode() if member == "txt" else json.dumps({"captions": [BREAKS]}).encode()
        source = pictures.tar(
            "lines.tar", [(f"s{n}.{e}", c) for n in (0, 1) for e, c in (("png", picture(n)), (member, text))]
        )
    seen: list[str] = []
    data = train_loader(
        f"file:{source}" if kind == "streamed" else source, preprocess,
        lambda texts: seen.extend(texts) or torch.zeros(len(texts), 2), 1, 0, cache="cached" in kind, progress=False,
        **({"train_num_samples": 2} if kind == "streamed" else {}),
    )  # fmt: skip
    for epoch in range(4):
        data.set_epoch(epoch)
        list(data.dataloader)
    assert set(seen) == {BREAKS}
    said = [message for message in caplog.messages if "captions" in message]
    assert len(said) == ("csv" not in kind and member == "txt")


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


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_data_and_see_equally_many_batches(pictures, kind):
    ranks = [loader(pictures, kind, world_size=2, rank=rank) for rank in (0, 1)]
    seen = [epoch_of(data, 3) for data in ranks]
    assert len(seen[0]) == len(seen[1]) == 12
    assert sorted(picture for rank in seen for picture, _, _ in rank) == list(range(24))
    assert len({data.dataloader.num_batches for data in ranks}) == 1


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


def with_noise(image):
    """The picture with random noise below its integer value."""
    return preprocess(image) + torch.rand(()) / 2


@pytest.mark.parametrize("kind", ["webdataset", "csv", "streamed"])
def test_ranks_augment_differently(pictures, kind):
    source = pictures.csv() if kind == "csv" else pictures.shards()
    source, size = (f"file:{source}", 24) if kind == "streamed" else (source, None)
    noise = []
    for rank in (0, 1):
        data = train_loader(source, with_noise, tokenizer, 3, 1, world_size=2, rank=rank, train_num_samples=size)
        noise.append(torch.cat([images[:, 0, 0, 0] % 1 for images, _ in data.dataloader]))
    assert not torch.isclose(*noise).any()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "streamed"])
def test_unreadable_samples_of_a_shard_are_skipped_and_counted(pictures, kind, workers, caplog):
    source = pictures.shards()
    pictures.damage_content(0, "s1.png")
    pictures.damage_header(1, "s8.png")
    pictures.damage_header(2, "s14.json")
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be 0"),
        ({"accum_freq": 0}, "accum_freq must be at least 1"),
        (
            {"accum_freq": 9},
            "batch_size: got 3 for 1 processes, and 9 of them per step, but .* has 24 readable samples",
        ),
        ({"data_retries": -1}, "data_retries must be 0"),
        ({"world_size": 2, "rank": 2}, "rank: got 2 for world_size 2, expected 0 to 1"),
        ({"dataset_type": "parquet"}, "dataset_type must be one of"),
        ({"train_num_samples": 0}, "train_num_samples must be at least 1"),
        ({"max_skipped": -0.1}, "max_skipped must be a share"),
        ({"max_skipped": float("nan")}, "max_skipped must be a share"),
        ({"max_image_pixels": 0}, "max_image_pixels must be at least 1"),
        ({"cache": True, "train_num_samples": 5}, "train_num_samples: has no effect with cache"),
        ({"cache": True, "dataset_resampled": True}, "dataset_resampled: has no effect with cache"),
        ({"cache": True, "batch_size": 25}, "batch_size: got 25 for 1 processes, but .* has 24 readable samples"),
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
    with pytest.raises(ValueError, match=r"train_data: .* is a directory: name its shards .*train-\*\.tar"):
        train_loader(folder, preprocess, tokenizer, 3)
    with pytest.raises(ValueError, match="train_data: cannot tell the format of .* set dataset_type"):
        train_loader("images.parquet", preprocess, tokenizer, 3)
    with pytest.raises(FileNotFoundError, match="names no shard"):
        train_loader("", preprocess, tokenizer, 3, dataset_type="webdataset")


def test_a_wrong_csv_says_which_column_is_missing(pictures):
    source = pictures.csv(separator=",")
    for cached in (False, True):
        with pytest.raises(ValueError, match=r"csv_img_key: .* has no column 'filepath'.*csv_separator \(now '\\t'\)"):
            train_loader(source, preprocess, tokenizer, 3, cache=cached)
        with pytest.raises(ValueError, match="csv_caption_key: .* has no column 'text', its columns are"):
            train_loader(source, preprocess, tokenizer, 3, csv_separator=",", csv_caption_key="text", cache=cached)
    assert train_loader(source, preprocess, tokenizer, 3, csv_separator=",").dataloader.num_batches == 8
    for content, message in (("", "has no column"), ("filepath\ttitle\n", "holds no sample")):
        (pictures.folder / "train.csv").write_text(content)
        for cached in (False, True):
            with pytest.raises(ValueError, match=message):
                train_loader(source, preprocess, tokenizer, 3, 0, cache=cached)
    with pytest.raises(ValueError, match="batch_size: got 25 for 1 processes, but .* has 24 readable samples"):
        loader(pictures, "csv", batch_size=25)


def test_a_cache_that_does_not_fit_is_refused_before_reading(pictures, monkeypatch):
    monkeypatch.setattr(indexed.os, "sysconf", lambda name: 64)
    with pytest.raises(ValueError, match=r"cache: 24 images of 3 x 4 x 4 take .* more than half of"):
        loader(pictures, "cached webdataset")


def test_the_options_of_a_loader_can_be_one_object(pictures):
    source = pictures.csv(separator=",")
    options = DataOptions(train_data=source, batch_size=3, workers=0, csv_separator=",", seed=5)
    by_object = load_train_data(options, preprocess, tokenizer)
    by_keyword = train_loader(source, preprocess, tokenizer, 3, 0, 5, csv_separator=",")
    assert samples_of(by_object.dataloader) == samples_of(by_keyword.dataloader)
    with pytest.raises(TypeError, match="csv_seperator"):
        train_loader(source, preprocess, tokenizer, 3, csv_seperator=",")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "streamed"])
def test_local_files_are_read_without_webdataset(pictures, monkeypatch, kind):
    source = {"source": str(pictures.folder / "train-*.tar")} if pictures.shards() and "csv" not in kind else {}
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "clipup.data.streamed", raising=False)
    monkeypatch.delattr(clipup.data, "streamed", raising=False)
    assert len(epoch_of(loader(pictures, kind, **source), 0)) == 24


def test_an_epoch_may_have_fewer_or_more_samples_than_the_data(pictures):
    some = [epoch_of(loader(pictures, "webdataset", train_num_samples=12), epoch) for epoch in range(20)]
    assert all(len({picture for picture, _, _ in seen}) == 12 for seen in some)
    assert {picture for seen in some for picture, _, _ in seen} == set(range(24))
    more = [picture for picture, _, _ in epoch_of(loader(pictures, "csv", train_num_samples=48), 0)]
    assert sorted(more[:24]) == sorted(more[24:]) == list(range(24)) and more[:24] != more[24:]


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
