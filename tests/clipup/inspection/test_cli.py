"""clipup inspect: a model's or a run's directory, images and captions in, one page out."""

import shutil
import tarfile
from unittest.mock import Mock

import pytest
import torch
from html_page import Page, assert_stands_alone
from PIL import Image
from sparse_clip import CAPTIONS, dense_clip, pictures, sparse_clip, sparse_config

from clipup import save_pretrained
from clipup.cli import main
from clipup.inspection import expert_report


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    save_pretrained(sparse_clip(), directory, sparse_config())
    return directory


@pytest.fixture
def images(tmp_path):
    directory = tmp_path / "photos"
    (directory / "more").mkdir(parents=True)
    for index, picture in enumerate(pictures(4)):
        picture.save(directory / ("more" if index % 2 else "") / f"{index}.{'JPG' if index else 'png'}")
    (directory / "notes.txt").write_text("no image")
    (directory / "photo.bmp").write_text("a kind that is not read")
    return directory


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n\n", encoding="utf-8")
    return path


def made(out, *arguments):
    assert main(["inspect", *map(str, arguments), "--device", "cpu", "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_a_model_with_images_and_captions_is_a_page(model, images, captions, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    html = made(out, model, "--images", images, "--captions", captions)
    printed = capsys.readouterr()
    assert printed.out == f"4 images and {len(CAPTIONS)} captions: {out}\n"
    assert "passed over pictures of other kinds (1): bmp (1)" in printed.err
    assert_stands_alone(html)
    text = Page(html).text
    assert "The experts of tiny-moe" in text and "4 sparse layers, run on 4 images and 5 captions." in text
    assert "to the dense MLP" not in text and "0.png" in text and "more/3.JPG" in text and "trained" not in text


def test_the_page_of_a_finished_run_shows_its_steps(model, captions, tmp_path):
    shutil.copytree(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 30}\n')
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert "trained for 30 steps." in Page(made(tmp_path / "r.html", path, "--captions", captions)).text


def test_photos_stand_upright(model, tmp_path, monkeypatch):
    inspected = Mock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(expert_report, "inspect_experts", inspected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as phones store it
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "photos" / "photo.jpg", exif=exif)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(model), "--images", str(tmp_path / "photos")])
    assert [image.size for image in inspected.call_args.args[1]] == [(32, 64)]


def test_experts_are_compared_with_the_dense_model(model, images, tmp_path):
    save_pretrained(dense_clip(), tmp_path / "dense", sparse_config())
    text = Page(made(tmp_path / "r.html", model, "--images", images, "--dense", tmp_path / "dense")).text
    assert "to the dense MLP" in text and "to dense: 0." in text


def test_a_run_that_goes_on_stands_for_its_newest_checkpoint(model, captions, tmp_path, capsys):
    sparse, checkpoints = sparse_clip(), tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    configs = {"model_cfg": sparse_config(), "moe_cfg": sparse.moe_config.to_dict()}
    state = {"epoch": 0, "step": 3, "optimizer": {}, **configs, "state_dict": sparse.state_dict()}
    torch.save(state, checkpoints / "epoch_latest.pt")
    html = made(tmp_path / "r.html", tmp_path / "run", "--captions", captions)
    assert html.replace("of run", "of tiny-moe") == made(tmp_path / "m.html", model, "--captions", captions)

    (checkpoints / "epoch_latest.pt").rename(checkpoints / "epoch_1.pt")
    (checkpoints / "epoch_latest.pt").write_bytes((checkpoints / "epoch_1.pt").read_bytes()[:5000])
    assert made(tmp_path / "o.html", tmp_path / "run", "--captions", captions) == html
    assert "epoch_1.pt, because a checkpoint cannot be used" in capsys.readouterr().err


def test_shards_bring_their_captions_and_incomplete_samples_are_counted_and_named(model, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    for index, picture in enumerate(pictures(3)):
        picture.save(files / f"{index}.png")
        (files / f"{index}.txt").write_text(f"picture number {index}\nzebra")
    with tarfile.open(tmp_path / "test-000.tar", "w") as shard:
        for path in sorted(files.iterdir()):
            shard.add(path, path.name)
        shard.add(files / "0.png", "b <i>.png")
    text = Page(made(tmp_path / "r.html", model, "--images", tmp_path / "test-*.tar")).text
    assert "run on 3 images and 3 captions" in text and "zebra" not in text and "2 · picture number 2" in text
    assert "3 images and 3 captions, 1 skipped (such as b <i> in " in capsys.readouterr().out
    assert "1 image could not be read and was skipped" in text and "b <i> in " in text


def test_max_images_is_kept_and_unreadable_images_are_counted_and_named(model, images, captions, tmp_path, capsys):
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:60])
    arguments = ["--images", images, "--captions", captions, "--max-images", 3, "--shown", 1]
    html = made(tmp_path / "r.html", model, *arguments)
    assert "1 skipped (such as 0.png: " in capsys.readouterr().out
    text = Page(html).text
    assert "1 image could not be read and was skipped" in text and "run on 2 images and 3 captions" in text
    assert html.count(">input<") == 1
