"""Readers of benchmarks, on small data sets in the real layouts."""

import json

import benchmark_layouts as layouts
import open_clip
import pytest
from clip_benchmark.datasets.builder import build_dataset
from PIL import Image

from clipup.data.csv_files import CsvOptions
from clipup.evaluate import datasets


def pairs(found):
    """(file, captions) of a retrieval set."""
    return [(record.key, list(record.captions)) for record in found.records]


@pytest.fixture
def coco(tmp_path):
    return layouts.coco(tmp_path / "coco")


@pytest.fixture
def flickr(tmp_path):
    return layouts.flickr30k(tmp_path / "flickr30k")


@pytest.mark.parametrize("name, read", [("mscoco_captions", datasets.coco), ("flickr30k", datasets.flickr30k)])
def test_images_and_captions_are_those_of_clip_benchmark_in_its_order(name, read, request):
    root = request.getfixturevalue("coco" if name == "mscoco_captions" else "flickr")
    theirs = build_dataset(name, root=str(root), split="test", task="zeroshot_retrieval", transform=lambda image: image)

    ours = read(root)

    assert len(ours.records) == len(theirs) == 12
    for record, (image, captions) in zip(ours.records, theirs, strict=True):
        assert list(record.captions) == [caption.strip() for caption in captions]
        assert len(captions) == 5 and all(", " in caption for caption in captions)
        assert image.tobytes() == Image.open(record.path).convert("RGB").tobytes()


@pytest.mark.parametrize("read, name", [(datasets.coco, "coco"), (datasets.flickr30k, "flickr30k")])
def test_karpathys_own_file_is_read_and_restval_belongs_to_train(read, name, request):
    root = request.getfixturevalue("coco" if name == "coco" else "flickr")
    layouts.karpathy(root, f"dataset_{name}.json")
    for path in root.glob(f"{name}_test_karpathy.*"):
        path.unlink()

    test, train = read(root, "test"), read(root, "train")

    assert [len(found.records) for found in (test, train)] == [6, 6]
    assert [captions for _, captions in pairs(test)] == [layouts.captions(number) for number in range(0, 12, 2)]
    with pytest.raises(ValueError, match="has no images of the split 'val', its splits are restval, test"):
        read(root, "val")


def test_a_caption_of_flickr_ends_at_a_line_feed_alone(flickr):
    path = flickr / "flickr30k_test_karpathy.txt"
    path.write_bytes(
        path.read_bytes().replace(b", ", ", a \x85 b \u2028 c \r d \x0b ".encode()).replace(b"\n", b"\r\n")
    )
    found = datasets.flickr30k(flickr).records
    assert len(found) == 12 and all(len(record.captions) == 5 for record in found)
    assert all("a \x85 b \u2028 c \r d \x0b" in caption for record in found for caption in record.captions)


@pytest.mark.parametrize(
    ("name", "inner", "directory"),
    [
        ("imagenet", "val", lambda label: f"n{1440764 + label:08d}"),  # in sorted order
        ("imagenet_v2", "imagenetv2-matched-frequency-format-val", str),
    ],
)
def test_imagenets_directories_are_open_clips_classes(tmp_path, name, inner, directory):
    root = getattr(layouts, name)(tmp_path)
    found = getattr(datasets, name)(root)

    assert [label for _, label in found.images] == list(range(0, 1000, 100))
    assert all(path.parent.name == directory(label) for path, label in found.images)
    assert found.classes == open_clip.IMAGENET_CLASSNAMES and len(found.templates) == 80
    assert getattr(datasets, name)(root / inner).images == found.images


def test_clip_benchmarks_shards_give_their_own_type(tmp_path):
    retrieval = datasets.webdataset(layouts.webdataset(tmp_path / "retrieval", retrieval=True))
    classification = datasets.webdataset(layouts.webdataset(tmp_path / "classification", retrieval=False))

    assert sorted(pairs(retrieval)) == [(f"s{number:07d}", layouts.captions(number)) for number in range(12)]
    assert classification.classes == ["cat", "dog", "sea"]
    assert classification.templates == ["a photo of a {}.", "the {}"]


def test_a_csv_of_a_directory_names_images_inside_it(tmp_path):
    layouts.picture(0).save(tmp_path / "0.jpg")
    (tmp_path / "test.csv").write_text("filepath\ttitle\n0.jpg\ta cat\n./0.jpg\ta dog\n")

    (record,) = datasets.csv(tmp_path, "test", CsvOptions()).records

    assert record.path == str(tmp_path / "0.jpg") and record.captions == ("a cat", "a dog")
    with pytest.raises(FileNotFoundError, match="root: .*val.csv"):
        datasets.csv(tmp_path, "val", CsvOptions())


def test_images_of_coco_that_are_missing_are_refused(coco, tmp_path):
    moved = (coco / "coco_test_karpathy.json").rename(tmp_path / "mine.json")
    assert len(datasets.coco(coco, annotations=moved).records) == 12
    for root in (coco, coco / "nowhere"):  # without annotations, and without anything
        with pytest.raises(FileNotFoundError):
            datasets.coco(root)
    first = coco / "val2014" / "COCO_val2014_000000391895.jpg"
    first.unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 12 images .*000000391895.jpg"):
        datasets.coco(coco, annotations=moved)


@pytest.mark.parametrize("content", [[{"image": "a.jpg"}], {"annotations": []}, {"images": [], "annotations": [{}]}])
def test_annotations_in_another_format_are_refused(coco, tmp_path, content):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="^annotations: .*other.json"):
        datasets.coco(coco, annotations=other)


def test_a_split_without_shards_and_a_caption_file_without_a_header_are_named(tmp_path, flickr):
    with pytest.raises(FileNotFoundError, match="^split: .*val"):
        datasets.webdataset(layouts.webdataset(tmp_path / "shards", retrieval=True), "val")
    path = flickr / "flickr30k_test_karpathy.txt"
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match="^annotations: "):
        datasets.flickr30k(flickr)


@pytest.mark.parametrize("read", [datasets.imagenet, datasets.imagenet_v2])
def test_directories_that_are_not_those_of_imagenet_are_refused(tmp_path, read):
    layouts.imagenet(tmp_path, classes=3)
    layouts.imagenet_v2(tmp_path, classes=3)
    with pytest.raises(ValueError, match="3 subdirectories"):
        read(tmp_path)
    (tmp_path / "imagenetv2-top-images-format-val").mkdir()
    for wrong in (
        lambda: datasets.imagenet_v2(tmp_path),  # of several variants
        lambda: datasets.imagenet(layouts.imagenet(tmp_path / "whole") / "val", "train"),
        lambda: datasets.imagenet(tmp_path, "dev"),
        lambda: read(tmp_path / "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            wrong()
