"""Shards that are damaged, truncated or not tar files: losses are logged and counted, equally in streamed and cached
data."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import tarfile

import pytest
from picture_samples import preprocess, samples_of, tokenizer

from clipup.data import shard_names
from clipup.data.loaders import eval_samples, train_loader
from clipup.demo.pictograms import build as pictograms
from clipup.evaluate import datasets
from clipup.evaluate.labelled_images import image_shards

SHARD = "train-000001.tar"  # samples 6 to 11 of 24


def read(pictures, source, cached: bool, **options):
    """The samples of an epoch, and the number of skipped ones."""
    if not cached and not (pictures.folder / "sizes.json").exists():
        options["train_num_samples"] = 24
    data = train_loader(source, preprocess, tokenizer, 1, 0, cache=cached, progress=False, **options)
    return {picture for picture, _, _ in samples_of(data.dataloader)}, data.skipped


def damages(pictures):
    """By name: the damaged content, the remaining samples, and a part of the reason."""
    path = pictures.folder / SHARD
    content = path.read_bytes()

    def zero(start, end):
        return content[:start] + bytes(end - start) + content[end:]

    def member(name):
        with tarfile.open(path) as tar:
            return tar.getmember(name).offset

    return {
        "a page of HTML": (b"<!DOCTYPE html>404", (), "it is not an uncompressed tar file, it begins with b'<!DOCTYPE"),
        "noise": (bytes(range(1, 256)) * 100, (), "it is not an uncompressed tar file"),
        "gzip": (gzip.compress(content), (), "it is not an uncompressed tar file"),
        "nothing": (b"", (), "empty file"),
        "zeros": (bytes(204_800), (), "its last 400 blocks are damaged"),
        "cut between samples": (content[: member("s9.png")], (6, 7, 8), "no end-of-archive mark"),
        "cut in a sample": (content[: member("s9.json")], (6, 7, 8), "no end-of-archive mark"),
        "cut in a header": (content[: member("s9.png") + 100], (6, 7, 8), "damaged"),
        "cut in an image": (content[: member("s9.png") + 530], (6, 7, 8), "unexpected end of data"),
        "a hole": (zero(member("s8.png"), member("s10.png")), (6, 7, 10, 11), "damaged"),
    }  # fmt: skip


KINDS = ("a page of HTML", "noise", "gzip", "nothing", "zeros", "cut between samples", "cut in a sample",
         "cut in a header", "cut in an image", "a hole")  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_is_named_and_every_lost_sample_is_counted(pictures, kind, cached, caplog):
    source = pictures.shards()
    content, left, reason = damages(pictures)[kind]
    (pictures.folder / SHARD).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        seen, skipped = read(pictures, source, cached, max_skipped=0.3)
    assert seen == {*range(6), *left, *range(12, 24)}
    assert skipped == 6 - len(left)
    (message,) = [line for line in caplog.messages if reason in line]
    assert SHARD in message


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_sizes_json_a_damaged_shard_is_counted_by_the_size_of_the_others(pictures, kind, cached):
    source = pictures.shards()
    content, left, _ = damages(pictures)[kind]
    (pictures.folder / SHARD).write_bytes(content)
    (pictures.folder / "sizes.json").unlink()
    seen, skipped = read(pictures, source, cached, max_skipped=0.3)
    assert seen == {*range(6), *left, *range(12, 24)}
    assert skipped == (1 if kind == "a hole" else 6 - len(left))  # the number of samples in the hole is unknown


@pytest.mark.parametrize("cached", [False, True])
def test_samples_missing_according_to_sizes_json_are_counted(pictures, picture, cached, caplog):
    source = pictures.shards()
    pictures.tar(SHARD, [member for n in (6, 7, 8, 9) for member in ((f"s{n}.png", picture(n)), (f"s{n}.txt", b"1 0"))])
    with caplog.at_level(logging.WARNING):
        assert read(pictures, source, cached) == ({*range(10), *range(12, 24)}, 2)
    path = pictures.folder / SHARD
    assert f"skipped a part of {path}: it holds 4 samples, sizes.json beside it lists more (2 samples)" in caplog.text


@pytest.mark.parametrize(
    "kind, listed", [("cut in a header", 2), ("cut in an image", 0), ("cut between samples", 2), ("a page of HTML", 0)]
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_sizes_json_that_says_too_little_hides_no_loss(pictures, cached, kind, listed):
    source = pictures.shards()
    content, left, _ = damages(pictures)[kind]
    (pictures.folder / SHARD).write_bytes(content)
    sizes = pictures.folder / "sizes.json"
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {SHARD: listed}))
    seen, skipped = read(pictures, source, cached, max_skipped=0.3, **({} if cached else {"train_num_samples": 24}))
    assert seen == {*range(6), *left, *range(12, 24)} and skipped == 6 - len(left)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_without_end_mark_that_holds_what_sizes_json_says_is_whole(pictures, cached):
    source = pictures.shards()
    path = pictures.folder / SHARD
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + 512)
    assert read(pictures, source, cached) == (set(range(24)), 0)


@pytest.mark.parametrize("cached", [False, True])
def test_concatenated_shards_are_complete(pictures, cached):
    pictures.shards(shards=2)
    whole = b"".join((pictures.folder / f"train-00000{n}.tar").read_bytes() for n in range(2))
    (pictures.folder / "all.tar").write_bytes(whole)
    (pictures.folder / "sizes.json").unlink()
    assert read(pictures, pictures.folder / "all.tar", cached) == (set(range(24)), 0)


def test_evaluation_counts_lost_samples_and_a_benchmark_refuses_them(pictures):
    source = pictures.shards()
    (pictures.folder / SHARD).write_bytes(b"<html>")
    samples = eval_samples(source, preprocess, max_skipped=0.25)
    assert len(list(samples)) == 18 and samples.skipped == 6
    with pytest.raises(ValueError, match="max_skipped: 6 of 24 samples"):
        eval_samples(source, preprocess)
    with pytest.raises(ValueError, match=f"and 6 without; .*{SHARD}: it is not an uncompressed tar file"):
        datasets.webdataset(source)
    with pytest.raises(ValueError, match=f"cannot read .*{SHARD}: it is not an uncompressed tar file"):
        list(image_shards(str(pictures.folder / SHARD)))


@pytest.fixture
def built(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "data")
    return tmp_path / "data"


def tokens_of_any(texts):
    import torch

    return torch.zeros(len(texts), 1, dtype=torch.long)


@pytest.mark.parametrize("how", ["zeroed", "one bit"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_shard_that_differs_from_the_built_one_is_refused_by_name(built, split, how):
    path = built / f"{split}-000000.tar"
    content = bytearray(path.read_bytes())
    if how == "zeroed":
        content[:] = bytes(len(content))
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = f"{path} is not the file listed in dataset.json beside it"
    if split == "train":
        for cached in (False, True):
            for source in (built, built / "train-*.tar"):
                with pytest.raises(ValueError, match=f"train_data: {message}"):
                    train_loader(source, preprocess, tokens_of_any, 4, 0, cache=cached, progress=False)
    else:
        with pytest.raises(ValueError, match=f"source: {message}"):
            eval_samples(built / "test-*.tar", preprocess)
        with pytest.raises(ValueError, match=f"root: {message}"):
            datasets.webdataset(built, "test")


def test_a_shard_is_hashed_once_per_process(built, monkeypatch):
    hashed = []
    real = shard_names.sha256
    monkeypatch.setattr(shard_names, "sha256", lambda path: hashed.append(str(path)) or real(path))
    for _ in range(3):
        eval_samples(built / "test-*.tar", preprocess)
    assert hashed == sorted(map(str, built.glob("test-*.tar")))


def test_a_damaged_data_set_does_not_count_as_finished(small, tmp_path, in_the_small):
    out = tmp_path / "data"
    shutil.copytree(small[0], out)
    path = out / "test-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    build = {"samples_per_shard": 64, "processes": 1, "progress": False, "only": in_the_small}
    with pytest.raises(ValueError, match="--overwrite"):
        pictograms.build(out, **build)
    pictograms.build(out, overwrite=True, **build)
    assert path.read_bytes() == whole


def test_a_dataset_json_of_another_tool_is_ignored(pictures):
    source = pictures.shards()
    for content in ({"splits": {"train": 24}}, {"name": "mine"}):
        (pictures.folder / "dataset.json").write_text(json.dumps(content))
        assert read(pictures, source, True) == (set(range(24)), 0)
