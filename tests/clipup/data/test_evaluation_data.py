"""Images with all their captions, in the order of the files."""

import json
import logging

import pytest
import torch
from picture_samples import png, preprocess

from clipup.data.formats import name_of_format
from clipup.data.loaders import eval_samples


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_every_image_with_all_its_captions_and_metadata(small, workers):
    out, dataset = small
    samples = eval_samples(out / "test-*.tar", preprocess)
    one_by_one = list(samples)
    assert len(samples) == dataset["splits"]["test"]["images"] == len(one_by_one)
    assert sum(len(captions) for _, captions, _ in one_by_one) == dataset["splits"]["test"]["captions"]
    image, captions, about = one_by_one[0]
    assert image.shape == (3, 32, 32) and captions and {"key", "concept", "source", "group"} <= set(about)
    images, captions, about = zip(*samples.batches(7, workers), strict=True)
    assert torch.equal(torch.cat(images), torch.stack([image for image, _, _ in one_by_one]))
    assert [c for batch in captions for c in batch] == [c for _, c, _ in one_by_one]
    assert [a for batch in about for a in batch] == [a for _, _, a in one_by_one]


def test_a_txt_has_a_caption_a_line_and_a_caption_elsewhere_is_whole(pictures):
    """A line ends at a line feed, as CLIP_benchmark writes it, and nowhere else."""
    one, whole = "one\x85of\u2028the\x0bfirst", "red cat\nblue dog\u2028house"
    members = [("a.png", png(1)), ("a.txt", f"\ufeff{one}\r\ntwo\n\nthree\n".encode())]
    members += [("b.png", png(2)), ("b.json", json.dumps({"captions": [whole, "d"], "group": 3}).encode())]
    samples = eval_samples(pictures.tar("one.tar", members), preprocess)
    assert [captions for _, captions, _ in samples] == [[one, "two", "three"], [whole, "d"]]
    assert [about for _, _, about in samples] == [{"key": "a"}, {"key": "b", "group": 3}]
    for about in (b"{cut off", b"[1, 2]", b'{"captions": "a line"}', b'{"captions": []}'):
        path = pictures.tar("one.tar", [("a.png", png(1)), ("a.txt", b"red"), ("a.json", about)])
        assert [captions for _, captions, _ in eval_samples(path, preprocess)] == [["red"]]


def test_csv_rows_of_one_image_are_its_captions(pictures):
    path, image, other = (pictures.folder / name for name in ("captions.csv", "a.png", "b.png"))
    image.write_bytes(png(1))
    other.write_bytes(png(2))
    path.write_text(f'file,text\n{image},red\n{other},"two, or\nmore, lines"\n{image},dark red\n{image},red\n')
    samples = eval_samples(path, preprocess, csv_separator=",", csv_img_key="file", csv_caption_key="text")
    assert [(int(i[0, 0, 0]), captions) for i, captions, _ in samples] == [
        (1, ["red", "dark red"]),
        (2, ["two, or\nmore, lines"]),
    ]


def test_a_missing_image_of_a_csv_file_is_one_lost_sample_however_many_captions_it_has(pictures):
    rows = []
    for number in range(20):
        (pictures.folder / f"{number}.png").write_bytes(png(number))
        rows += [f"{pictures.folder}/{number}.png\tcaption {caption}" for caption in range(5)]
    (pictures.folder / "7.png").unlink()
    path = pictures.folder / "captions.csv"
    path.write_text("\n".join(["filepath\ttitle", *rows, ""]))
    samples = eval_samples(path, preprocess, max_skipped=0.05)
    assert (len(samples), samples.skipped) == (19, 1)


@pytest.mark.parametrize(("damaged", "max_skipped"), [((4, 5), 0.2), ((4, 9), 0.1)])
def test_processes_judge_together_what_they_could_not_read(pictures, damaged, max_skipped):
    source = pictures.shards(count=16, shards=1)
    for number in damaged:
        pictures.damage(0, f"s{number}.png", header=False)
    processes = []
    for index in range(4):
        whole = eval_samples(source, preprocess, max_skipped=max_skipped)
        processes.append(whole.only(whole.samples[4 * index : 4 * index + 4]))
        assert len(list(processes[-1])) == 4 - sum(number // 4 == index for number in damaged)
    gathered = [(samples.skips.samples, samples.skips.first) for samples in processes]
    for samples in processes:
        if 2 <= max_skipped * 16:
            samples.check_all(lambda mine: gathered)
        else:
            with pytest.raises(ValueError, match="max_skipped: 2 of 16 samples .*s[49]"):
                samples.check_all(lambda mine: gathered)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_once(pictures, workers, caplog):
    source = pictures.shards(count=6, shards=1)
    pictures.damage(0, "s2.png", header=False)
    pictures.damage(0, "s5.png", header=True)  # what follows is lost
    samples = eval_samples(source, preprocess, max_skipped=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            seen = [int(i) for images, _, _ in samples.batches(2, workers) for i in images[:, 0, 0, 0]]
            assert seen == [0, 1, 3, 4]
    assert samples.skipped == 2 and caplog.text.count("s2 in") == 1


@pytest.mark.parametrize(
    "source, dataset_type, name",
    [
        ("data/a.csv", "auto", "csv"),
        ("a.tar.tsv", "auto", "csv"),
        ("https://host/{00..99}.tar?version=3", "auto", "webdataset"),
        ("tars.tar/a.txt", "auto", None),
        ("a.tar", "csv", "csv"),
        (None, "csv", None),
    ],
)
def test_the_format_of_data_goes_by_the_ending_unless_it_is_given(source, dataset_type, name):
    assert name_of_format(source, dataset_type) == name
