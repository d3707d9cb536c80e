"""clipup index and clipup search as a photographer calls them: without a place, a model or a precision."""

import base64
import os
import re
from pathlib import Path

import open_clip
import pytest
from benchmark_layouts import picture
from huggingface_hub import constants
from sparse_clip import sparse_clip, sparse_config

import clipup
import clipup_kernels
from clipup.cli import main
from clipup.data import image_files, images
from clipup.models import factory, hub
from clipup.search import ImageIndex, default_directory, encoder

START = Path(clipup.__file__).parent / "demo" / "start"
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9j"
    "AAAAAERAAAEAAQAAAAABoQABAAAAAAAAAGoAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/Wlw"
    "cnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AA"
    "AAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAA"
    "QAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAIAAAAAEAAAAAAAAAAv///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWB"
    "AgMFhAAAAHJtZGF0AAAAZigBrxOA9SeBP//uJUV/7RFq/01PMSrfIP9/+pmiL+NNJ24DBKtcZDhnZz3YDJQq1G1WFFEGvEcPlr5Pf+aGoBRr"
    "GmVu/wBzK5h44mDnmxQMkvDiJrOw7kf+JjzP61zvBE3AdIf0MA=="
)
"""64 x 32 pixels: the left half blue, the right one red."""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(6):
        picture(number).resize((32, 32)).save(root / f"{number}.png")
    return root


@pytest.fixture
def index(photos, tmp_path):
    """Indexes the photos with a small model, which the first call names."""
    clipup.save_pretrained(sparse_clip(), tmp_path / "model", sparse_config())

    def run(*options, model=("--model", str(tmp_path / "model"))):
        assert main(["index", str(photos), *model, "--workers", "0", "--device", "cpu", *options]) == 0
        return ImageIndex.load(photos)

    return run


def test_an_index_is_found_by_the_directory_of_its_photographs(photos, index, tmp_path, monkeypatch, capsys):
    index()
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    assert default_directory(photos).parent == tmp_path / "data" / "clipup" / "indexes"
    for name in (str(photos), "link", "photos/", str(default_directory(photos))):
        capsys.readouterr()
        assert main(["search", name, "a red bicycle", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.count(".png") == 6
    assert main(["search", "data", "a red bicycle"]) == 2
    assert "make one: clipup index IMAGES" in capsys.readouterr().err


def test_photographs_added_later_are_encoded_as_the_others(photos, index):
    first = index("--precision", "bf16").encoder
    picture(7).save(photos / "new.png")
    made = index(model=())
    assert len(made.entries) == 7 and made.encoder == first and made.encoder.precision == "bf16"


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="int8 needs the C++ extension")
@pytest.mark.parametrize("least", [0.98, 1.1])
def test_int8_is_used_if_the_photographs_agree_and_the_index_keeps_the_outcome(index, monkeypatch, capsys, least):
    monkeypatch.setattr(encoder, "_LEAST", least)
    made = index().encoder
    assert made.int8 == (least < 1) and made.int8_agreement["images"] == 6
    assert 0.98 < made.int8_agreement["least"] <= made.int8_agreement["mean"] < 1.001
    assert f"encoded in {'int8' if made.int8 else 'fp32'}" in capsys.readouterr().out
    assert index("--precision", "int8" if made.int8 else "fp32").encoder.int8 == made.int8
    monkeypatch.setattr(encoder, "_LEAST", 1.1)
    assert index(model=()).encoder == made


def test_without_kernels_for_int8_photographs_are_encoded_in_float32(index, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("no kernel multiplies int8")

    monkeypatch.setattr(encoder, "accelerate", refuses)
    made = index().encoder
    assert (made.precision, made.int8, made.int8_agreement) == ("fp32", False, None)


def test_the_size_of_the_default_model_is_said_before_it_is_downloaded(photos, tmp_path, monkeypatch, capsys):
    """Without a network, one line says what to do instead, and names no flag that was not given."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(open_clip, "create_model_and_transforms", unreachable)
    assert main(["index", str(photos)]) == 2
    size, error = capsys.readouterr().err.splitlines()
    assert "ViT-B-32-256 (151 M parameters, about 605 MB)" in size and "--pretrained" not in error
    assert all(part in error for part in ("pass the file", *encoder.DEFAULT_MODEL))


def unreachable(*args, **kwargs):
    raise hub.LocalEntryNotFoundError("not in the cache")


def test_a_model_without_weights_is_answered_with_its_tags(photos, capsys):
    assert main(["index", str(photos), "--model", "ViT-B-16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(tag in line for tag in open_clip.list_pretrained_tags_by_model("ViT-B-16"))


def test_of_a_model_trained_on_icons_a_photographer_is_warned(index, capsys):
    index(model=("--model", str(START)))
    assert "was trained on icons" in capsys.readouterr().err


def test_images_are_found_by_an_image_and_paths_are_printed_as_they_are(photos, index, capsysbinary):
    os.rename(photos / "0.png", os.fsencode(photos) + b"/caf\xe9\n.png")
    index()
    capsysbinary.readouterr()
    search = ["search", str(photos), "--image", str(photos / "3.png"), "--device", "cpu"]
    assert main([*search, "--paths-only"]) == 0
    out = capsysbinary.readouterr().out
    assert out.startswith(os.fsencode(photos / "3.png") + b"\n") and b"caf\xe9\n.png\n" in out
    assert main([*search, "--min-score", "0.99999"]) == 0
    assert capsysbinary.readouterr().out.count(b".png") == 2  # the query and its file
    assert main(["search", str(photos), "--image", "nowhere.png"]) == main(["search", str(photos)]) == 2
    assert b"--image: nowhere.png is not there" in capsysbinary.readouterr().err


def test_heic_is_read_with_its_extra_and_counted_without(photos):
    (photos / "phone.HEIC").write_bytes(HEIC)
    if images.decodes_heic():
        image = images.load_image(str(photos / "phone.HEIC"))
        assert image.size == (64, 32) and image.getpixel((5, 5))[2] > 150 and image.getpixel((60, 5))[0] > 150
        assert len(image_files.image_files(photos)) == 7 and not image_files.passed_over(photos)
    else:
        assert len(image_files.image_files(photos)) == 6
        assert re.search(r"heic \(1\); .* needs the package pi_heif.*\[heic\]", image_files.passed_over(photos))


def test_what_a_killed_call_left_in_an_index_does_not_stop_the_next_one(index, photos):
    index()
    (default_directory(photos) / ".writing-left").mkdir()
    assert len(index().entries) == 6


def test_photographs_that_are_gone_are_counted_and_what_is_hidden_is_left_out(photos, index, capsys):
    index()
    for name in ("._0.png", ".Trash-1000/1.png", "@eaDir/2.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes((photos / "0.png").read_bytes())
    (photos / "5.png").unlink()
    assert len(index().entries) == 5
    assert "not there any more, and have left the index: 1" in capsys.readouterr().err


def test_a_directory_of_other_images_is_refused_before_the_model_is_loaded(
    index, photos, tmp_path, monkeypatch, capsys
):
    """Nothing is said of images that would leave the index."""
    index()
    other = tmp_path / "other"
    other.mkdir()
    picture(7).save(other / "7.png")
    capsys.readouterr()
    monkeypatch.setattr(factory, "create_model_and_transforms", unreachable)
    assert main(["index", str(other), str(default_directory(photos))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(photos) in line and str(other) in line


def test_a_damaged_index_is_named_and_not_made_by_another_model(index, photos, monkeypatch, capsys):
    index()
    file = default_directory(photos) / "index.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    monkeypatch.setattr(factory, "create_model_and_transforms", unreachable)
    for command in (["index", str(photos)], ["search", str(photos), "bicycle"]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line and "remove this file" in line
    assert len(file.read_bytes()) == 100


def test_an_index_that_is_not_finished_says_so_when_it_is_searched(photos, index, capsys):
    index()
    file = default_directory(photos) / "index.safetensors"
    part = file.parent / "parts" / "1" / file.name
    part.parent.mkdir(parents=True)
    file.rename(part)
    assert main(["search", str(photos), "bicycle"]) == 2
    assert f"{file.parent} is not finished" in capsys.readouterr().err
    assert len(index(model=()).entries) == 6


def test_what_is_skipped_is_named_with_its_reason(photos, index, capsys):
    (photos / "broken.png").write_bytes(b"not a picture")
    (photos / "link.jpg").symlink_to("nowhere.jpg")
    assert set(index().skipped) == {"broken.png", "link.jpg"}
    said = capsys.readouterr()
    assert "skipped broken.png: ValueError: it is not an image" in said.err
    assert "skipped link.jpg: FileNotFoundError" in said.err
    assert f"Indexed 6 images, skipped 2. Index: {default_directory(photos)}" in said.out


def test_folders_that_may_not_be_read_are_named(photos, index, monkeypatch, capsys):
    (photos / "lost+found").mkdir()
    monkeypatch.setattr(image_files.os, "access", lambda path, mode: Path(path).name != "lost+found")
    index()
    assert f"without permission to read: '{photos / 'lost+found'}'" in capsys.readouterr().err


def test_a_model_that_has_moved_is_asked_for_and_found_at_its_new_place(photos, index, tmp_path, capsys):
    index()
    (tmp_path / "model").rename(tmp_path / "moved")
    for command in (["index", str(photos)], ["search", str(photos), "bicycle"]):
        assert main(command) == 2
        assert "model" in (error := capsys.readouterr().err) and f"{tmp_path / 'model'}, which is not there" in error
    index(model=("--model", str(tmp_path / "moved")))
    assert main(["search", str(photos), "bicycle", "-n", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count(".png") == 2


def test_a_directory_is_no_image_to_search_by_and_a_file_no_place_for_an_index(photos, index, tmp_path, capsys):
    index()
    assert main(["search", str(photos), "--image", str(photos)]) == 2
    assert f"--image: {photos} is a directory" in capsys.readouterr().err
    assert main(["index", str(photos), str(photos / "0.png"), "--model", str(tmp_path / "model")]) == 2
    assert f"out: {photos / '0.png'} is a file" in capsys.readouterr().err


def test_nothing_is_written_over_or_among_photographs(photos, index, tmp_path, capsys):
    index()
    other = tmp_path / "other"
    other.mkdir()
    picture(7).save(other / "7.png")
    before = (other / "7.png").read_bytes()
    assert main(["index", str(photos), str(other), "--model", str(tmp_path / "model")]) == 2
    assert main(["search", str(photos), "bicycle", "--page", str(other / "7.png")]) == 2
    assert [path.name for path in other.iterdir()] == ["7.png"] and (other / "7.png").read_bytes() == before
    messages = capsys.readouterr().err
    assert f"out: {other} holds 7.png" in messages and "page: expected a name that ends in .html" in messages
