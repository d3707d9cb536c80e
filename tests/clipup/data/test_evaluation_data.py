"""Images with all their captions, for retrieval."""

from __future__ import annotations

import json
import logging
import multiprocessing

import pytest
import torch
from picture_samples import preprocess

from clipup.data.loaders import eval_samples


@pytest.mark.parametrize("split", ["test", "concepts"])
def test_evaluation_shards_give_images_captions_and_metadata(small, split):
    out, dataset = small
    samples = eval_samples(f"{out}/{split}-*.tar", preprocess)
    assert len(samples) == dataset["splits"][split]["images"] == len(list(samples))
    image, captions, about = next(iter(samples))
    assert image.shape == (3, 32, 32) and captions[0] and set(about) == {"key", "concept", "source", "group"}
    assert sum(len(captions) for _, captions, _ in samples) == dataset["splits"][split]["captions"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_same_samples_in_the_same_order(small, workers):
    samples = eval_samples(small[0] / "test-000000.tar", preprocess)
    one_by_one = list(samples)
    images, captions, about = zip(*samples.batches(7, workers), strict=True)
    assert torch.equal(torch.cat(images), torch.stack([image for image, _, _ in one_by_one]))
    assert [c for batch in captions for c in batch] == [c for _, c, _ in one_by_one]
    assert [a for batch in about for a in batch] == [a for _, _, a in one_by_one]


def test_a_txt_has_a_caption_a_line_and_a_caption_elsewhere_is_whole(pictures, picture):
    """A line ends at a line feed, as CLIP_benchmark writes it, and nowhere else."""
    one, whole = "one\x85of\u2028the\x0bfirst", "red cat\nblue dog\u2028house"
    members = [("a.png", picture(1)), ("a.txt", f"{one}\r\ntwo\n\nthree\n".encode())]
    members += [("b.png", picture(2)), ("b.json", json.dumps({"captions": [whole, "d"]}).encode())]
    samples = eval_samples(pictures.tar("one.tar", members), preprocess)
    assert [captions for _, captions, _ in samples] == [[one, "two", "three"], [whole, "d"]]
    assert [about for _, _, about in samples] == [{"key": "a"}, {"key": "b"}]

    (pictures.folder / "a.png").write_bytes(picture(1))
    table = pictures.folder / "table.csv"
    table.write_text(f'filepath\ttitle\n{pictures.folder}/a.png\t"{whole}"\n')
    assert [captions for _, captions, _ in eval_samples(table, preprocess)] == [[whole]]


def test_with_invalid_json_the_text_has_the_captions(pictures, picture):
    for about in (b"{cut off", b"[1, 2]", b'{"captions": "a line"}', b'{"captions": []}'):
        path = pictures.tar("one.tar", [("a.png", picture(1)), ("a.txt", b"red"), ("a.json", about)])
        assert [captions for _, captions, _ in eval_samples(path, preprocess)] == [["red"]]


def test_csv_rows_of_one_image_are_its_captions(pictures, picture):
    path, image, other = (pictures.folder / name for name in ("captions.csv", "a.png", "b.png"))
    image.write_bytes(picture(1))
    other.write_bytes(picture(2))
    path.write_text(f"file,text\n{image},red\n{other},black\n{image},dark red\n{image},red\n")
    samples = eval_samples(path, preprocess, csv_separator=",", csv_img_key="file", csv_caption_key="text")
    assert [(int(i[0, 0, 0]), captions) for i, captions, _ in samples] == [(1, ["red", "dark red"]), (2, ["black"])]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_once(pictures, workers, caplog):
    source = pictures.shards(count=6, shards=1)
    pictures.damage_content(0, "s2.png")
    pictures.damage_header(0, "s4.png")
    samples = eval_samples(source, preprocess, max_skipped=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            seen = [int(i) for images, _, _ in samples.batches(2, workers) for i in images[:, 0, 0, 0]]
            assert seen == [0, 1, 3, 5]
    assert [int(image[0, 0, 0]) for image, _, _ in samples] == seen
    assert samples.skipped == 2
    assert caplog.text.count("s2 in") == 1


def test_evaluation_data_that_cannot_be_found_is_an_error(pictures, picture):
    folder = pictures.folder
    with pytest.raises(FileNotFoundError, match="source: no shard"):
        eval_samples(folder / "test-*.tar", preprocess)
    with pytest.raises(FileNotFoundError, match="source: there is no file"):
        eval_samples(folder / "none.csv", preprocess)
    with pytest.raises(ValueError, match="source: .* is a directory: it holds no shard"):
        eval_samples(folder, preprocess)
    with pytest.raises(ValueError, match="holds no sample with an image and a caption .1 skipped, the first is a in"):
        eval_samples(pictures.tar("one.tar", [("a.png", picture(1)), ("a.txt", b" \n")]), preprocess)
    with pytest.raises(ValueError, match="source: cannot tell the format of"):
        eval_samples(folder / "images.parquet", preprocess)


def test_workers_end_when_reading_is_left_early_or_by_an_error(pictures):
    shards, before = pictures.shards(count=4, shards=1), set(multiprocessing.active_children())
    batches = eval_samples(shards, preprocess).batches(1, workers=2)
    next(batches)
    batches.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(TypeError) as kept:
        list(eval_samples(shards, lambda image: image.convert("L")).batches(1, workers=2))
    assert kept.value and set(multiprocessing.active_children()) <= before
