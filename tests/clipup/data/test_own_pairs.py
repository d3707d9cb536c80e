"""Shards of one's own image-text pairs."""

import json
from pathlib import Path

import pytest
from picture_samples import encoded, epoch_of, load, png
from PIL import Image

from clipup.cli import main
from clipup.data import own_pairs
from clipup.data.loaders import eval_samples

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    """Pictures with captions beside them, in two subfolders with the same names."""
    for number in range(COUNT):
        image = tmp_path / f"folder/{number % 2}/v1.{number // 2}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(number))
        image.with_suffix(".txt").write_text(f"{number} 0")
    return tmp_path / "folder"


@pytest.fixture
def csv(folder):
    images = sorted(folder.rglob("*.png"))
    rows = [f"{image},{image.with_suffix('.txt').read_text()}\n" for image in images]
    (folder.parent / "pairs.csv").write_text("file,caption\n" + "".join(rows))
    return folder.parent / "pairs.csv"


COLUMNS = ["--csv-separator", ",", "--csv-img-key", "file", "--csv-caption-key", "caption"]


def made_of(source, *options):
    out = Path(source).with_suffix(".shards")
    assert main(["data", "pairs", str(source), str(out), "--samples-per-shard", "4", "--processes", "0", *options]) == 0
    return out


def pairs_in(directory):
    return sorted(epoch_of(load("webdataset", str(directory / "train-*.tar"), batch_size=1)))


def test_training_on_the_shards_of_a_csv_file_or_a_folder_is_training_on_the_csv_file(folder, csv, tmp_path):
    sources = {"csv": (csv, *COLUMNS), "of_csv": (made_of(csv, *COLUMNS),), "of_folder": (made_of(folder),)}
    losses = {}
    for name, data in sources.items():
        run = ["--model", "clipup-tiny-32", "--logs", str(tmp_path), "--name", name, "--device", "cpu"]
        step = ["--steps", "1", "--batch-size", str(COUNT - 2), "--workers", "0", "--log-every-n-steps", "1"]
        assert main(["train", *run, *step, "--train-data", *map(str, data)]) == 0
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["csv"] == losses["of_csv"] == losses["of_folder"]


def test_rows_of_an_image_are_its_captions(folder, csv):
    with csv.open("a") as file:
        file.write(f'{folder / "0/v1.0.png"},"1\n1"\n')
    [first, *_] = eval_samples(made_of(csv, *COLUMNS) / "train-*.tar", None).samples
    assert first.captions == ("0 0", "1\n1")


def test_an_image_of_a_format_that_shards_do_not_have_keeps_its_pixels(folder, csv):
    (folder / "9.bmp").write_bytes(encoded(Image.new("RGB", (4, 4), (9, 0, 0)), "BMP"))
    with csv.open("a") as file:
        file.write(f"{folder / '9.bmp'},9 0\n")
    assert (9, 9, 0) in pairs_in(made_of(csv, *COLUMNS))


def test_what_cannot_be_read_is_named_counted_and_left_out(folder, capsys, caplog):
    (folder / "torn.png").write_bytes(png(7)[:30])
    (folder / "torn.txt").write_text("7 0")
    (folder / "silent.jpg").write_bytes(png(8))
    (folder / "other.gif").write_bytes(b"")
    out = made_of(folder)
    printed = capsys.readouterr().out
    assert "captions: 6" in printed and "skipped: 2" in printed and "gif (1)" in printed
    assert "torn.png" in caplog.text and "silent.jpg: it has no caption" in caplog.text
    assert [caption for _, caption, _ in pairs_in(out)] == list(range(COUNT))
    assert json.loads((out / "sizes.json").read_text()) == {"train-000000.tar": 4, "train-000001.tar": 2}


def test_links_to_nowhere_are_counted_and_three_pictures_without_captions_named(folder, capsys, caplog):
    for number in range(5):
        (folder / f"silent {number}.png").write_bytes(png(number))
    (folder / "link.png").symlink_to("nowhere.png")
    made_of(folder)
    assert "captions: 6, skipped: 6" in capsys.readouterr().out
    assert (
        caplog.text.count("skipped silent") == 3
        and "has no caption in a .txt of the same name (samples: 2)" in caplog.text
    )
    assert "skipped link.png: FileNotFoundError" in caplog.text


def test_a_folder_without_images_is_named_as_the_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="^source: "):
        own_pairs.build(tmp_path, tmp_path / "out")


def test_nothing_is_left_of_a_build_that_fails_or_has_no_pair(folder, monkeypatch):
    (folder.parent / "empty.csv").write_text("filepath\ttitle\nno.png\ta cat\n")
    with pytest.raises(ValueError, match="no sample"):
        own_pairs.build(folder.parent / "empty.csv", folder.parent / "out", processes=0)
    monkeypatch.setattr("clipup.data.shard_writer.write_sizes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own_pairs.build(folder, folder.parent / "out", processes=0)
    assert {path.name for path in folder.parent.iterdir()} == {"folder", "empty.csv"}


def test_a_directory_of_shards_is_refused_with_the_shards_that_it_has(folder):
    out = made_of(folder)
    with pytest.raises(ValueError, match=r"is a directory: name shards, such as \S+/\*\.tar$"):
        eval_samples(out, None)
