"""Data sets from untrusted sources: nothing in them runs a command or reads files elsewhere.

Every attempt would create the file `trace`, or read `secret`.
"""

import io
import json
import os
import tarfile

import pytest
from picture_samples import load, pictures_of, png, preprocess, samples_of, tokenizer
from PIL import Image

from clipup.data.csv_files import CsvOptions
from clipup.data.images import load_image
from clipup.data.loaders import eval_samples, train_loader
from clipup.evaluate import datasets
from clipup.evaluate.labelled_images import image_shards
from studies.icon_data import iconify


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


@pytest.fixture
def listing(pictures, tmp_path):
    """Writes a data set whose dataset.json lists these names as its shards, and returns its directory."""

    def write(*names, **more):
        pictures.folder = tmp_path / "data set"
        pictures.folder.mkdir(exist_ok=True)
        pictures.shards()
        shards = [{"file": name, **more} for name in names]
        content = {"splits": {"train": {"shards": shards}, "test": {"shards": shards}}}
        (pictures.folder / "dataset.json").write_text(json.dumps(content))
        return pictures.folder

    return write


def consume(source, **options):
    return samples_of(train_loader(source, preprocess, tokenizer, 3, 0, progress=False, **options).dataloader)


def test_what_controls_a_terminal_is_escaped_in_names(pictures, caplog):
    """Of a sample without a picture that can be read, and of one without a caption."""
    evil = "\x1b]0;pwned\x07\u202e"
    good = [(f"s{n}.{e}", c) for n in range(12) for e, c in (("png", png(n)), ("txt", b"1 0"))]
    bad = [(f"{evil}1.png", b"broken"), (f"{evil}1.txt", b"1 0"), (f"{evil}2.png", png(2))]
    consume(pictures.tar("train.tar", [*bad, *good]), max_skipped=0.5)
    assert "\\x1b]0;pwned\\x07\\u202e" in caplog.text and caplog.text.count("skipped") == 2
    assert not {"\x1b", "\x07", "\u202e"} & set(caplog.text)


@pytest.mark.parametrize(
    "name",
    [
        "train-000000.tar::pipe:touch TRACE",
        "{train-000000.tar,pipe:touch TRACE}",
        "../outside.tar",
        "/OUTSIDE",
        "",
        "..",
    ],
)
def test_a_data_set_may_only_name_files_beside_it(listing, pictures, trace, name, monkeypatch, tmp_path):
    pictures.shards()
    os.rename(tmp_path / "train-000000.tar", tmp_path / "outside.tar")
    name = name.replace("TRACE", str(trace)).replace("/OUTSIDE", str(tmp_path / "outside.tar"))
    directory = listing("train-000000.tar", name)
    monkeypatch.chdir(directory)
    for source in (directory, "."):
        with pytest.raises(ValueError, match=r"dataset\.json"):
            consume(source)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            datasets.webdataset(source, "test")
    assert not trace.exists()


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"dataset_resampled": True}])
@pytest.mark.parametrize(
    "pattern, fault",
    [
        ("pipe:touch TRACE", "would run a command"),
        ("PATH::pipe:touch TRACE", "would run a command"),
        ("pip{e,e}:touch TRACE", "would run a command"),
        (" PIPE:touch TRACE", "would run a command"),
        ("https://localhost/a'; touch TRACE; '.tar", "contains a quote"),  # of those that webdataset puts around it
    ],
)
def test_a_pipe_runs_only_if_allowed_and_a_url_runs_nothing(pictures, trace, pattern, fault, options):
    source = pattern.replace("PATH", pictures.shards()).replace("TRACE", f"{trace} #.tar")
    size = {} if "cache" in options else {"train_num_samples": 24}
    with pytest.raises(ValueError, match=f"^train_data: .* {fault}"):
        consume(source, **options, **size)
    assert not trace.exists()


def test_an_allowed_pipe_is_read(pictures):
    pictures.shards()
    source = f"pipe:cat {pictures.folder}/train-{{000000..000003}}.tar"
    seen = consume(source, allow_pipe=True, train_num_samples=24)
    assert sorted(picture for picture, _, _ in seen) == list(range(24))


def test_evaluation_never_runs_a_pipe(trace):
    for read in (
        lambda source: eval_samples(source, preprocess),
        lambda source: list(image_shards(source)),
        datasets.webdataset,
    ):
        with pytest.raises(ValueError, match="would run a command"):
            read(f"pipe:touch {trace} #.tar")
    assert not trace.exists()


def test_members_that_are_not_regular_files_are_ignored(pictures, tmp_path):
    """Links, absolute names and `..` in a shard: no target is read, nothing is written, and what is lost counts."""
    (tmp_path / "secret.txt").write_text("1 0")
    members = [
        *(("a.png", png(1)), ("a.txt", (tarfile.SYMTYPE, str(tmp_path / "secret.txt")))),
        *(("b.png", png(1)), ("b.txt", (tarfile.LNKTYPE, "../secret.txt"))),
        *(("c.png", png(1)), ("c.txt", (tarfile.FIFOTYPE, ""))),
        *(("../d.png", png(7)), ("../d.txt", b"7 0")),
        *(("/tmp/e.png", png(8)), ("/tmp/e.txt", b"8 0")),
        *(("f.png", (tarfile.LNKTYPE, "a.png")), ("f.txt", (tarfile.LNKTYPE, "../d.txt"))),
    ]
    shard = pictures.tar("train.tar", members)
    for kind, source in (("webdataset", ""), ("cached webdataset", ""), ("streamed", "file:")):
        data = load(kind, f"{source}{shard}", 2, count=6, max_skipped=0.9)
        assert set(pictures_of(data)) == {7, 8} and data.skipped == 4


def test_an_image_does_not_start_ghostscript():
    """Pillow runs the program `gs` on EPS, whatever the file extension."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="it is not an image of a supported format"):
        load_image(eps)


def test_annotations_may_only_name_images_in_their_directory(tmp_path):
    root = tmp_path / "coco"
    (root / "val2014").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(1))
    for name in ("../../secret.png", str(tmp_path / "secret.png")):
        content = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
        (root / "coco_test_karpathy.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"annotations: .*secret\.png, which is not in"):
            datasets.coco(root)
        (root / "test.csv").write_text(f"filepath,title\n{name},a\n")
        with pytest.raises(ValueError, match="its image is not in"):
            datasets.csv(root, "test", CsvOptions(csv_separator=","))


def test_an_icon_cannot_include_a_file_from_disk(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "secret.png")
    for body in (
        f'<image href="{tmp_path}/secret.png" width="16" height="16"/>',
        f'<image alt=">" xlink:href=\'{tmp_path}/secret.png\' width="16" height="16"/>',
        f'<filter id="f"><feImage href="{tmp_path}/secret.png"/></filter><rect filter="url(#f)" width="9"/>',
    ):
        with pytest.raises(ValueError, match="an image from a file"):
            iconify.render(iconify._document({"body": body}), 16)
