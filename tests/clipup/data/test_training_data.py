"""Training batches from WebDataset shards, from CSV files, from memory and from streams."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from picture_samples import epoch_of, load, pictures_of, png, preprocess, tokenizer
from strangers import MakesFile

from clipup.data.loaders import eval_samples, train_loader
from clipup.data.shards import ShardSource
from clipup.data.skips import Skips

KINDS = ("webdataset", "csv", "cached webdataset", "cached csv", "streamed")


@pytest.mark.parametrize(
    "kind, workers", [*((kind, 0) for kind in KINDS), ("csv", 2), ("cached webdataset", 2), ("streamed", 2)]
)
def test_an_epoch_has_every_sample_once_and_depends_on_seed_and_epoch(pictures, kind, workers):
    source, before = pictures.source(kind), torch.random.get_rng_state()
    data = load(kind, source, workers=workers, seed=1)
    epochs = [epoch_of(data, epoch) for epoch in (0, 1)]
    for seen in epochs:
        assert sorted(picture for picture, _, _ in seen) == list(range(24))
        assert all(picture == caption and variant in (0, 1, 2) for picture, caption, variant in seen)
    assert (data.skipped, data.dataloader.num_samples, data.dataloader.num_batches) == (0, 24, 8)
    assert epochs[0] != epochs[1]
    assert epoch_of(load(kind, source, workers=workers, seed=1, epoch=1), 1) == epochs[1]
    assert epoch_of(load(kind, source, workers=workers, seed=2), 0) != epochs[0]
    assert torch.equal(torch.random.get_rng_state(), before)  # of training


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "streamed"])
def test_all_captions_of_an_image_are_drawn_over_many_epochs(pictures, kind):
    data = load(kind, pictures.source(kind))
    drawn = {(caption, variant) for epoch in range(40) for _, caption, variant in epoch_of(data, epoch)}
    assert drawn == {(caption, variant) for caption in range(24) for variant in range(3)}


LINES = "red cat\nblue dog\r\nhouse\x85of\u2028two\x0bor\x1cmore\rlines"
CAPTIONS = [LINES, 'a "big" dog', "NA", "007", "it's", 'six" nails']


@pytest.mark.parametrize("member", ["txt", "json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_read_as_it_is_written(pictures, kind, member):
    """Also one of several lines: a CSV cell, a txt as in open_clip, and a caption of a json."""
    if "csv" in kind:
        (pictures.folder / "0.png").write_bytes(png(0))
        source = pictures.folder / "lines.csv"
        cells = [caption.replace('"', '""') for caption in CAPTIONS]
        source.write_bytes(
            "".join(["filepath\ttitle\n", *(f'{pictures.folder}/0.png\t"{c}"\n' for c in cells)]).encode()
        )
    else:
        texts = [c.encode() if member == "txt" else json.dumps({"captions": [c, " ", 3]}).encode() for c in CAPTIONS]
        members = [one for n, text in enumerate(texts) for one in ((f"s{n}.png", png(n)), (f"s{n}.{member}", text))]
        source = pictures.tar("lines.tar", members)
    seen: list[str] = []
    record = lambda texts: seen.extend(texts) or torch.zeros(len(texts), 2)  # noqa: E731
    data = load(kind, f"file:{source}" if kind == "streamed" else source, 1, tokenize=record, count=6)
    for epoch in range(2):
        epoch_of(data, epoch)
    assert set(seen) == set(CAPTIONS)


LAYOUTS = {
    "img2dataset": {"json": b'{"caption": "3 0", "url": "u", "status": "success"}'},
    "img2dataset with texts": {"txt": b"3 0", "json": b'{"caption": "4 0"}'},
    "an empty txt": {"txt": b"\n", "json": b'{"caption": "3 0", "captions": []}'},
    "caption": {"json": b'{"caption": null}', "caption": b"3 0"},
    "text": {"text": b"3 0", "json": b'{"caption": "4 0"}'},
    "both": {"text": b"4 0", "caption": b"4 0", "txt": b"3 0"},
    "clipup data": {"txt": b"4 0", "json": b'{"captions": ["3 0"], "caption": "4 0"}'},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_read_in_the_layouts_that_people_have(pictures, layout):
    files = {"png": png(3), **LAYOUTS[layout]}
    shard = pictures.tar("train.tar", [(f"a.{name}", content) for name, content in files.items()])
    for kind in ("webdataset", "cached webdataset", "streamed"):
        assert epoch_of(load(kind, f"{'file:' * (kind == 'streamed')}{shard}", 1, count=1)) == [(3, 3, 0)]
    assert [captions for _, captions, _ in eval_samples(shard, preprocess)] == [["3 0"]]


def test_a_data_set_keeps_its_digest_so_that_its_runs_resume(pictures):
    texts = [("txt", b"a"), ("json", b'{"captions": ["b", "c"], "caption": "d"}'), ("text", b"e")]
    members = [
        (f"{n}.{name}", content) for n, last in enumerate((1, 3, 3)) for name, content in [("jpg", b"i"), *texts[:last]]
    ]
    assert ShardSource([str(pictures.tar("train.tar", members))], Skips()).digest == "ad6e7ba4906951a0"


def test_a_directory_stands_for_its_training_shards(small):
    out, dataset = small
    data = load("cached", out, 16, tokenize=lambda texts: torch.tensor([[len(text)] for text in texts]))
    assert data.dataloader.num_batches == dataset["splits"]["train"]["images"] // 16
    images, texts = next(iter(data.dataloader))
    assert images.shape == (16, 3, 32, 32) and len(texts) == 16


def test_shards_are_found_by_different_patterns(pictures):
    pictures.shards()
    folder = pictures.folder
    for source in (f"{folder}/train-*.tar", f"{folder}/train-00000[0-1].tar::{folder}/train-{{000002,000003}}.tar"):
        assert len(epoch_of(load("webdataset", source))) == 24


@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "streamed"])
def test_a_pickle_beside_an_image_is_not_executed(pictures, kind, tmp_path):
    trace = tmp_path / "executed"
    code = pickle.dumps(MakesFile(trace))
    shard = pictures.tar("train.tar", [("a.png", png(1)), ("a.jpg", png(2)), ("a.TXT", b"1 0"), ("a.pyd", code)])
    source = f"file:{shard}" if kind == "streamed" else shard
    assert epoch_of(load(kind, source, 1, count=1)) == [(2, 1, 0)]  # of several images the same one everywhere
    assert not trace.exists()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("webdataset", {"batch_size": 0}),
        ("webdataset", {"workers": -1}),
        ("webdataset", {"accum_freq": 9}),
        ("webdataset", {"data_retries": -1}),
        ("webdataset", {"rank": 2, "world_size": 2}),
        ("webdataset", {"dataset_type": "parquet"}),
        ("webdataset", {"train_num_samples": 0}),
        ("webdataset", {"max_skipped": float("nan")}),
        ("webdataset", {"max_image_pixels": 0}),
        ("webdataset", {"train_data_upsampling_factors": "1::2"}),
        ("cached webdataset", {"train_num_samples": 5}),
        ("cached webdataset", {"dataset_resampled": True}),
        ("cached webdataset", {"batch_size": 25}),
        ("csv", {"batch_size": 25}),
        ("csv", {"dataset_resampled": True}),
        ("csv", {"csv_img_key": "image"}),
        ("csv", {"csv_caption_key": "text"}),
        ("csv", {"csv_separator": "||"}),
        ("streamed", {"workers": 5}),
        ("streamed", {"train_num_samples": None}),
    ],
)
def test_wrong_options_are_refused_by_name(pictures, kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load(kind, pictures.source(kind), **options)


@pytest.mark.parametrize(
    "read",
    [train_loader, partial(train_loader, cache=True), lambda source, transform, *_: eval_samples(source, transform)],
)
@pytest.mark.parametrize(
    "name, error",
    [
        ("nothing-*.tar", FileNotFoundError),
        ("train-{000000..000009}.tar", FileNotFoundError),
        ("none.csv", FileNotFoundError),
        ("", ValueError),  # a directory
        ("images.parquet", ValueError),
        ("empty.csv", ValueError),
        ("latin.csv", ValueError),
        ("blank.tar", ValueError),  # of a caption
    ],
)
def test_missing_data_are_named(pictures, name, error, read):
    pictures.shards()
    pictures.tar("blank.tar", [("a.png", png(1)), ("a.txt", b" \n")])
    (pictures.folder / "empty.csv").write_text("filepath\ttitle\n")
    (pictures.folder / "latin.csv").write_bytes(b"filepath\ttitle\n1.png\tcaf\xe9\n")
    with pytest.raises(error, match="^(train_data|source): "):
        read(pictures.folder / name, preprocess, tokenizer, 3, 0)


@pytest.mark.parametrize(
    "encoding, said",
    [
        ("cp1252", "iconv -f WINDOWS-1252 -t UTF-8"),
        ("utf-16", "iconv -f UTF-16 -t UTF-8"),
        ("utf-8", rf"1\.png\): there is no such file; .* {Path.cwd()}\)"),
    ],
)
def test_the_encoding_of_a_csv_file_and_the_directory_of_its_paths_are_named(pictures, encoding, said):
    (pictures.folder / "a.csv").write_text("filepath\ttitle\n1.png\tcafé\n", encoding=encoding)
    with pytest.raises(ValueError, match=said):
        train_loader(pictures.folder / "a.csv", preprocess, tokenizer, 3, 0)


def test_a_cache_that_does_not_fit_is_refused_before_reading(pictures, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 64)
    with pytest.raises(ValueError, match="^cache_data: "):
        load("cached webdataset", pictures.shards())


@pytest.mark.parametrize("kind", ["webdataset", "cached csv"])
def test_indexed_data_do_not_need_webdataset(pictures, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "clipup.data.streamed", raising=False)
    assert len(epoch_of(load(kind, pictures.source(kind)))) == 24


def test_an_epoch_may_have_fewer_or_more_samples_than_the_data(pictures):
    some = [pictures_of(load("webdataset", pictures.shards(), train_num_samples=12), epoch) for epoch in range(20)]
    assert all(len(set(seen)) == 12 for seen in some) and set().union(*some) == set(range(24))
    more = pictures_of(load("csv", pictures.csv(), train_num_samples=48))
    assert sorted(more[:24]) == sorted(more[24:]) == list(range(24)) and more[:24] != more[24:]


def test_an_error_of_preprocess_names_the_image_and_lack_of_memory_skips_none(pictures, caplog):
    def broken(image):
        raise error

    error: Exception = OSError(28, "no space")
    with pytest.raises(ValueError, match=r"no space.*\(preprocess of .*train\.csv"):
        epoch_of(load("csv", pictures.csv(), transform=broken, max_skipped=1.0))
    error = MemoryError()
    for kind in ("csv", "cached webdataset", "streamed"):
        with pytest.raises(MemoryError):
            epoch_of(load(kind, pictures.source(kind), transform=broken, max_skipped=1.0))
    with caplog.at_level(logging.WARNING):
        assert "skipped" not in caplog.text
