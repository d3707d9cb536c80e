"""Unreadable samples of every kind are skipped, logged and counted once, and too many of them stop the run."""

import gzip
import json
import logging
import os
import tarfile
from functools import partial

import pytest
from picture_samples import epoch_of, load, pictures_of, png, preprocess, tokenizer

from clipup.data.loaders import eval_samples, train_loader
from clipup.evaluate import datasets
from clipup.evaluate.labelled_images import image_shards

KINDS = ("csv", "cached csv", "webdataset", "cached webdataset", "streamed")
TARS = KINDS[2:]
SHARD = "train-000001.tar"  # samples 6 to 11 of 24


def read(kind, path, count=24, **options):
    """The pictures of an epoch, and the number of skipped samples."""
    data = load(kind, f"file:{path}" if kind == "streamed" else path, 1, count=count, **{"max_skipped": 1.0, **options})
    return set(pictures_of(data)), data.skipped


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_undecodable_image_is_logged_and_counted_once(pictures, kind, workers, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(kind, pictures.source(kind, 60, (3, 17, 40)), 4, workers, count=60)
        for epoch in range(3):
            assert {3, 17, 40}.isdisjoint(pictures_of(data, epoch))
    assert data.skipped == 3
    named = [line for line in caplog.messages if line.startswith("skipped")]
    assert len(named) == 3 == sum(f"/{n}.png" in line or f" s{n} in" in line for n in (3, 17, 40) for line in named)


@pytest.mark.parametrize("content", ['{"caption": "a cat', "[1]", '"a cat"', "null", b"\xff"])
def test_a_broken_json_is_named_where_no_other_member_has_a_caption(pictures, content, caplog):
    broken = content if isinstance(content, bytes) else content.encode()
    members = [("s1.png", png(1)), ("s1.json", broken), ("s2.png", png(2)), ("s2.json", broken), ("s2.txt", b"2 0")]
    members += [("s3.png", png(3)), ("s3.json", b'{"caption": " "}')]

    with caplog.at_level(logging.WARNING):
        assert read("webdataset", str(pictures.tar("broken.tar", members)), count=1) == ({2}, 2)

    assert ["json is broken" in line for line in caplog.messages if line.startswith("skipped")] == [True, False]


@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_unusable_rows_are_removed_from_the_index(pictures, kind, caplog):
    """Missing, without image or caption, a directory: an epoch has the remaining rows."""
    source = pictures.csv(40)
    (pictures.folder / "3.png").unlink()
    image = pictures.folder / "1.png"
    with open(source, "a") as file:
        file.write(f"{image}\t\n{image}\t \u3000\n\t1 0\n{pictures.folder}\t1 0\n{image}\t1 0\tone more\n\n")
    with caplog.at_level(logging.WARNING):
        data = load(kind, source, max_skipped=0.2)
    assert sorted(pictures_of(data)) == [n for n in range(40) if n != 3]
    assert data.skipped == len(caplog.messages) == 6


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in KINDS), ("csv", 2), ("streamed", 2)])
def test_reading_stops_above_the_largest_skipped_share(pictures, kind, workers):
    source = pictures.source(kind, 60, range(0, 60, 8))  # 8 of 60
    with pytest.raises(ValueError, match=r"max_skipped: [78] of 60 samples"):
        for epoch in range(2):
            epoch_of(load(kind, source, 4, workers, count=60), epoch)
    data = load(kind, source, 4, workers, count=60, max_skipped=0.2)
    for epoch in range(2):
        epoch_of(data, epoch)
    assert data.skipped == 8


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_the_largest_skipped_share_holds_for_epochs_of_a_part_of_the_data(pictures, kind):
    source = pictures.source(kind, 240, range(0, 240, 12))
    epoch_of(load(kind, source, 4, train_num_samples=48, max_skipped=0.3))
    with pytest.raises(ValueError, match=r"max_skipped: \d+ of 48 samples"):
        for epoch in range(3):
            epoch_of(load(kind, source, 4, train_num_samples=48, max_skipped=0.02), epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_checks_its_own_part_with_a_tolerance(pictures, kind):
    """A cache is read by every rank as a whole, and checked exactly."""
    ranks = [{"count": 120, "world_size": 2, "rank": rank} for rank in (0, 1)]
    source = pictures.source(kind, 120, range(0, 120, 15))
    for rank in ranks:
        epoch_of(load(kind, source, 4, max_skipped=0.07 if "cached" in kind else 0.05, **rank))
    source = pictures.source(kind, 120, range(0, 120, 3))
    for rank in ranks:
        with pytest.raises(ValueError, match="max_skipped: "):
            epoch_of(load(kind, source, 4, **rank))


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_any_readable_sample_are_an_error_and_do_not_loop(pictures, kind, monkeypatch):
    monkeypatch.setattr("clipup.data.streamed._DRAWN", 10)
    source = pictures.source(kind, 24, range(24))
    with pytest.raises(ValueError, match="can be read|readable samples|holds no sample"):
        epoch_of(load(kind, source, max_skipped=1.0))
    if kind == "streamed":
        with pytest.raises(ValueError, match="readable samples"):
            epoch_of(load("webdataset", source[5:], max_skipped=1.0, dataset_resampled=True, train_num_samples=24))


@pytest.mark.parametrize("kind", TARS)
def test_incomplete_and_damaged_members_of_a_shard_are_counted_once(pictures, kind, caplog):
    source = pictures.shards()
    pictures.damage(0, "s1.png", header=False)
    for text in (b" \n", b"caf\xe9"):
        pictures.tar(f"more-{len(text)}.tar", [("s23.png", png(23)), ("s23.txt", text)])
        source += f"::{pictures.folder}/more-{len(text)}.tar"
    source = "::".join(f"file:{part}" for part in source.split("::")) if kind == "streamed" else source
    with caplog.at_level(logging.WARNING):
        data = load(kind, source, 1, count=26, max_skipped=0.3)
        seen = {*pictures_of(data, 0), *pictures_of(data, 1)}
    assert seen == set(range(24)) - {1} and data.skipped == 3
    for name, times in {"s1 in": 1, "s23 in": 2}.items():
        assert sum(f"skipped {name}" in line for line in caplog.messages) == times


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("kind", TARS)
def test_every_image_whose_key_has_a_dot_is_counted_and_the_reason_is_said(pictures, kind, sizes, caplog):
    path = pictures.samples("train.tar", {f"s{n}" if n < 12 else f"photo.{n}": png(n) for n in range(24)})
    if sizes:
        (pictures.folder / "sizes.json").write_text('{"train.tar": 24}')
    assert read(kind, path) == (set(range(12)), 12)
    assert "skipped images of photo in" in caplog.text and "photo_12.png" in caplog.text


@pytest.mark.parametrize("kind", TARS)
def test_a_further_image_of_a_sample_does_not_count_as_lost(pictures, kind):
    members = [(f"s{n}.{e}", c) for n in range(4) for e, c in (("png", png(n)), ("txt", b"1 0"), ("mask.png", png(99)))]
    assert read(kind, pictures.tar("train.tar", members), 4) == (set(range(4)), 0)


def damages(path):
    """By name: the damaged content, the remaining samples, and a part of the reason."""
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        image, text, hole, after = (tar.getmember(name).offset for name in ("s9.png", "s9.json", "s8.png", "s10.png"))
    return {
        "gzip": (gzip.compress(content), (), "not an uncompressed tar"),
        "nothing": (b"", (), "empty"),
        "zeros": (bytes(204_800), (), "damaged"),
        "cut between samples": (content[:image], (6, 7, 8), "end-of-archive"),
        "cut in a sample": (content[:text], (6, 7, 8), "end-of-archive"),
        "cut in a header": (content[: image + 100], (6, 7, 8), "damaged"),
        "cut in an image": (content[: image + 530], (6, 7, 8), "unexpected end"),
        "a hole": (content[:hole] + bytes(after - hole) + content[after:] + bytes(10240), (6, 7), "damaged"),
        "a damaged header": (content[:hole] + b"x" * 512 + content[hole + 512 :], (6, 7), "damaged"),
    }


DAMAGES = ("gzip", "nothing", "zeros", "cut between samples", "cut in a sample", "cut in a header", "cut in an image",
           "a hole", "a damaged header")  # fmt: skip


@pytest.mark.parametrize("sizes", ["right", "none", "too little"])
@pytest.mark.parametrize("kind", TARS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_every_lost_sample_is_counted(pictures, damage, kind, sizes, caplog):
    """By sizes.json beside it or, without, by the size of the other shards. What follows damage is lost."""
    source = pictures.source(kind)
    content, left, reason = damages(pictures.folder / SHARD)[damage]
    (pictures.folder / SHARD).write_bytes(content)
    listed = pictures.folder / "sizes.json"
    if sizes == "none":
        listed.unlink()
    elif sizes == "too little":
        listed.write_text(json.dumps(json.loads(listed.read_text()) | {SHARD: 0}))
    with caplog.at_level(logging.WARNING):
        data = load(kind, source, 1, max_skipped=0.4)
        assert set(pictures_of(data)) == {*range(6), *left, *range(12, 24)}
    assert data.skipped == 6 - len(left)
    assert sum(SHARD in line and reason in line for line in caplog.messages) == 1


def test_a_shard_without_end_mark_is_whole_if_it_holds_what_sizes_json_says(pictures):
    pictures.shards(shards=2)
    shard = pictures.folder / "train-000000.tar"
    with tarfile.open(shard) as tar:
        os.truncate(shard, tar.getmembers()[-1].offset_data + 512)
    assert read("webdataset", shard) == (set(range(12)), 0)
    pictures.samples(shard.name, {f"s{n}": png(n) for n in range(9)})
    assert read("webdataset", shard) == (set(range(9)), 3)


@pytest.mark.parametrize("read", [eval_samples, partial(train_loader, tokenizer=tokenizer, batch_size=1, workers=0)])
@pytest.mark.parametrize("kind", ["shards", "csv"])
def test_a_wrong_layout_names_few_samples_with_their_files_and_counts_the_others(pictures, read, kind, caplog):
    if kind == "csv":
        source = pictures.folder / "train.csv"
        source.write_text("\n".join(["filepath\ttitle", *(f"no/{n}.jpg\ta" for n in range(64))]))
    else:
        members = [(f"{n}.{extension}", b"{}") for n in range(64) for extension in ("jpg", "meta", "json")]
        source = pictures.tar("train.tar", members)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="64 skipped"):
        read(source, preprocess=preprocess)
    assert len(caplog.messages) == 4 and "(samples: 61)" in caplog.messages[-1]
    for message in caplog.messages:
        assert ("no such file" if kind == "csv" else "jpg, meta, json") in message


def test_evaluation_counts_lost_samples_and_a_benchmark_refuses_them(pictures):
    source = pictures.shards()
    (pictures.folder / SHARD).write_bytes(b"<html>")
    samples = eval_samples(source, preprocess, max_skipped=0.25)
    assert len(list(samples)) == 18 and samples.skipped == 6
    for refused in (
        lambda: eval_samples(source, preprocess),
        lambda: datasets.webdataset(source),
        lambda: list(image_shards(str(pictures.folder / SHARD))),
    ):
        with pytest.raises(ValueError, match=SHARD):
            refused()
