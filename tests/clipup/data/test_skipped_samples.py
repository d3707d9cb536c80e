"""Unreadable rows and images: skipped, logged and counted once, never replaced by a row of the same batch, and too many
of them stop the run."""

from __future__ import annotations

import io
import logging
import tarfile

import pytest
from picture_samples import png, preprocess, samples_of, tokenizer

from clipup.data import sources
from clipup.data.loaders import eval_samples, train_loader

KINDS = ("csv", "cached csv", "webdataset", "cached webdataset", "streamed")
SPOILT = (3, 17, 40)


def spoilt(pictures, kind, numbers=SPOILT, count=60):
    """A source of pictures; those with these numbers cannot be decoded."""
    source = pictures.csv(count) if "csv" in kind else pictures.shards(count)
    for n in numbers:
        if "csv" in kind:
            path = pictures.folder / f"{n}.png"
            path.write_bytes(path.read_bytes()[:20])
        else:
            pictures.damage_content(n * 4 // count, f"s{n}.png")
    return source


def loader(kind, source, batch_size=4, workers=0, count=60, **options):
    if kind == "streamed":
        source, options = f"file:{source}", {"train_num_samples": count, **options}
    return train_loader(
        source, preprocess, tokenizer, batch_size, workers, cache="cached" in kind, progress=False, **options
    )


def batches_of(data, epoch):
    """The pictures of each batch."""
    data.set_epoch(epoch)
    return [[picture for picture, _, _ in samples_of([batch])] for batch in data.dataloader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_undecodable_image_is_logged_and_counted_once(pictures, kind, workers, caplog):
    with caplog.at_level(logging.WARNING):
        data = loader(kind, spoilt(pictures, kind), workers=workers)
        for epoch in range(3):
            assert set(SPOILT).isdisjoint(sum(batches_of(data, epoch), []))
    assert data.skipped == 3
    named = [line for line in caplog.messages if line.startswith("skipped")]
    assert len(named) == 3
    for n in SPOILT:
        (line,) = [line for line in named if f"/{n}.png" in line or f" s{n} in" in line]
        assert "it is not an image" in line or "Truncated" in line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_unusable_rows_are_removed_from_the_index(pictures, kind, workers, caplog):
    """Missing, without image or caption, a directory: an epoch has the remaining rows."""
    source = pictures.csv(40)
    (pictures.folder / "3.png").unlink()
    (pictures.folder / "9.png").unlink()
    with open(source, "a") as file:
        file.write(
            f"{pictures.folder / '1.png'}\t\n{pictures.folder / '1.png'}\t \u3000\n\t1 0\n{pictures.folder}\t1 0\n"
        )
        file.write(f"{pictures.folder / '1.png'}\t1 0\tone more\n")
    with caplog.at_level(logging.WARNING):
        data = loader(kind, source, batch_size=2, workers=workers, max_skipped=0.2)
    assert (data.skipped, data.dataloader.num_batches) == (7, 19)
    seen = sum(batches_of(data, 0), [])
    assert sorted(seen) == [n for n in range(40) if n not in (3, 9)]
    assert len(caplog.messages) == 7 and data.skipped == 7
    for part in ("3.png): its image is no file", "it has 3 cells, the header has 2", "it has no caption"):
        assert part in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_contains_a_row_twice(pictures, kind):
    """24 of 240 rows are unreadable: replaced by readable ones, or not in the cache."""
    data = loader(kind, spoilt(pictures, kind, range(0, 240, 10), 240), batch_size=16, count=240)
    for epoch in range(3):
        batches = batches_of(data, epoch)
        assert len(batches) == (13 if "cached" in kind else 15)
        exact = batches[:13] if kind == "streamed" else batches  # a stream may start over within the last ones
        assert all(len(set(batch)) == 16 for batch in exact)
    assert data.skipped == 24


def test_ranks_have_equally_many_batches_and_never_share_a_row(pictures):
    source = spoilt(pictures, "csv", range(0, 60, 10))
    ranks = [batches_of(loader("csv", source, world_size=2, rank=rank), 0) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 7
    for one, other in list(zip(*ranks, strict=True))[:6]:
        assert len({*one, *other}) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_stops_above_the_largest_skipped_share(pictures, kind, workers):
    source = spoilt(pictures, kind, range(0, 60, 8))  # 8 of 60
    message = (
        r"max_skipped: [78] of 60 samples cannot be read, more than the share of 0.1 .*(png|tar).*raise max_skipped"
    )
    with pytest.raises(ValueError, match=message):
        for epoch in range(2):
            batches_of(loader(kind, source, workers=workers), epoch)
    data = loader(kind, source, workers=workers, max_skipped=0.2)
    for epoch in range(2):
        batches_of(data, epoch)
    assert data.skipped == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_checks_its_own_part_with_a_tolerance(pictures, kind):
    """A cache is read by every rank as a whole, and checked exactly."""
    source = spoilt(pictures, kind, range(0, 120, 15), 120)
    share = 0.07 if "cached" in kind else 0.05
    for rank in (0, 1):
        batches_of(loader(kind, source, count=120, world_size=2, rank=rank, max_skipped=share), 0)
    source = spoilt(pictures, kind, range(0, 120, 3), 120)
    for rank in (0, 1):
        with pytest.raises(ValueError, match="max_skipped: .* samples cannot be read"):
            batches_of(loader(kind, source, count=120, world_size=2, rank=rank), 0)


@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_data_with_most_files_missing_are_refused_before_the_first_batch(pictures, kind):
    source = pictures.csv(100)
    for n in range(4, 100):
        (pictures.folder / f"{n}.png").unlink()
    with pytest.raises(ValueError, match=r"max_skipped: 96 of 100 samples cannot be read, .*line 6 of .*4\.png"):
        loader(kind, source)
    with pytest.raises(ValueError, match="batch_size: got 8"):
        loader(kind, source, batch_size=8, max_skipped=1.0)
    with pytest.raises(ValueError, match="max_skipped: 96 of 100"):
        eval_samples(source, preprocess)
    assert len(eval_samples(source, preprocess, max_skipped=0.96)) == 4


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("kind", ["webdataset", "cached webdataset", "streamed"])
def test_samples_whose_names_need_an_extended_header_are_named_and_counted_one_by_one(pictures, kind, form, caplog):
    names = [f"{chr(0x4E00 + n)}{'long ' * 30 * (n % 2)}" for n in range(20)]
    with tarfile.open(pictures.folder / "train.tar", "w", format=form) as tar:
        for n, name in enumerate(names):
            for extension, content in (("txt", f"{n} 0".encode()), ("png", png(n) if n < 12 else b"broken")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = loader(kind, pictures.folder / "train.tar", batch_size=2, count=20, max_skipped=0.5)
    batches_of(data, 0)
    assert data.skipped == 8
    for name in names[12:]:
        assert f"skipped {name} in {'file:' * (kind == 'streamed')}{pictures.folder / 'train.tar'}: " in caplog.text


def test_a_sample_whose_header_can_be_read_only_later_is_counted_once(pictures, monkeypatch):
    """And one that has been counted before a resume is not counted again."""
    data = loader("webdataset", spoilt(pictures, "webdataset", [17]), data_retries=0)
    with monkeypatch.context() as patched:
        patched.setattr(sources, "key_of", None)
        batches_of(data, 0)
    assert "the sample at byte" in data.skips.first
    batches_of(data, 1)
    assert data.skipped == 1
    resumed = loader("webdataset", str(pictures.folder / "train-{000000..000003}.tar"))
    resumed.skips.restore(data.skips.samples)
    batches_of(resumed, 2)
    assert resumed.skipped == 1
