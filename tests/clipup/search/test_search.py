"""clipup index and clipup search: one's own images, found by text; brought up to date, continued, exact."""

import base64
import html
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_layouts import picture
from html_page import Page
from PIL import Image
from sparse_clip import sparse_clip, sparse_config
from tiny_clip import save_with_words
from torchvision.transforms import Compose, Resize

import clipup
import clipup_kernels
from clipup.cli import main
from clipup.data import images
from clipup.data.image_files import image_files
from clipup.data.images import load_image
from clipup.locks import DirectoryInUse
from clipup.search import ImageIndex, Result, find, image_index, results_page, update_index
from clipup.search.encoder import Encoder
from clipup.search.image_index import Entry

ENCODER = Encoder("model", None, "fp32", False, "a0")


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number in range(6):
        path = root / ("holiday" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).resize((32, 32)).save(path)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def model(tmp_path):
    clipup.save_pretrained(sparse_clip(), tmp_path / "model", sparse_config())
    return str(tmp_path / "model")


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.convert("RGB").resize((8, 8)), np.float32)).permute(2, 0, 1) / 255


class Counted:
    """Encodes by flattening, and keeps how many images it saw."""

    def __init__(self):
        self.images = 0

    def __call__(self, batch):
        self.images += len(batch)
        return torch.nn.functional.normalize(batch.flatten(1), dim=-1)


def updated(directory, photos, encode, **options):
    records = image_files(photos)
    return update_index(directory, photos, records, ENCODER, encode, to_tensor, batch_size=2, **options)


def test_an_index_holds_every_image_once(tmp_path, photos):
    made = updated(tmp_path / "index", photos, encode := Counted())
    read = ImageIndex.load(tmp_path / "index")
    assert [entry.name for entry in read.entries] == [f"{n}.png" for n in (0, 2, 4)] + [
        f"holiday/{n}.png" for n in (1, 3, 5)
    ]
    assert torch.equal(read.features, made.features) and encode.images == 6
    assert not (tmp_path / "index" / "parts").exists()


def test_only_what_changed_is_encoded_again(tmp_path, photos):
    before = updated(tmp_path / "index", photos, Counted())
    picture(77).save(photos / "0.png")
    picture(78).save(photos / "new.png")
    (photos / "2.png").unlink()
    after = updated(tmp_path / "index", photos, encode := Counted())
    assert encode.images == 2
    assert [entry.name for entry in after.entries][:3] == ["0.png", "4.png", "holiday/1.png"]
    rows = {entry.name: row for row, entry in enumerate(before.entries)}
    for entry, feature in zip(after.entries, after.features, strict=True):
        if entry.name not in ("0.png", "new.png"):
            assert torch.equal(feature, before.features[rows[entry.name]])
    assert updated(tmp_path / "index", photos, again := Counted()).entries == after.entries and again.images == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_index_is_continued_and_a_damaged_part_named(tmp_path, photos, monkeypatch, damaged):
    monkeypatch.setattr(image_index, "PART_IMAGES", 2)
    index = tmp_path / "index"
    counted = Counted()
    with pytest.raises(ZeroDivisionError):
        updated(index, photos, lambda batch: counted(batch) if counted.images < 4 else 1 / 0)
    assert not (index / "index.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="is not finished"):
        ImageIndex.load(index)
    if damaged:
        part = min(index.glob("parts/*/index.safetensors"))
        part.write_bytes(b"nothing")
        with pytest.raises(ValueError, match=f"{part} is not a whole index of images .* remove this file"):
            updated(index, photos, Counted())
        part.unlink()
    made = updated(index, photos, rest := Counted())
    assert rest.images == (4 if damaged else 2)
    assert torch.equal(made.features, updated(tmp_path / "other", photos, Counted()).features)


def test_unreadable_images_are_named_and_skipped(tmp_path, photos, caplog):
    (photos / "broken.png").write_bytes(b"not a picture")
    made = updated(tmp_path / "index", photos, Counted())
    assert (
        "is not an image of a supported format" in made.skipped["broken.png"]
        and "is not an image of a supported format" in caplog.text
    )
    assert len(made.entries) == 6
    assert ImageIndex.load(tmp_path / "index").skipped == made.skipped
    for path in photos.rglob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="none of the 7 images can be read"):
        updated(tmp_path / "other", photos, Counted())


def test_an_index_of_another_model_or_directory_is_refused(tmp_path, photos):
    updated(tmp_path / "index", photos, Counted())
    for other in (replace(ENCODER, int8=True), replace(ENCODER, model_digest="b1")):
        with pytest.raises(ValueError, match=r"made with model in fp32 \(checksum a0\), not with model in "):
            update_index(tmp_path / "index", photos, image_files(photos), other, Counted(), to_tensor)
    with pytest.raises(ValueError, match="holds an index of the images in "):
        updated(tmp_path / "index", photos / "holiday", Counted())


def test_an_index_follows_images_and_model_that_moved(tmp_path, photos):
    before = updated(tmp_path / "index", photos, Counted())
    moved, renamed = photos.rename(tmp_path / "renamed"), replace(ENCODER, model="renamed", pretrained="weights.pt")
    after = update_index(tmp_path / "index", moved, image_files(moved), renamed, encode := Counted(), to_tensor)
    assert encode.images == 0 and torch.equal(after.features, before.features)
    assert (after.images, ImageIndex.load(tmp_path / "index").encoder) == (moved, renamed)


def test_an_index_is_not_handed_to_a_copy_of_its_images(tmp_path, photos):
    updated(tmp_path / "index", photos, Counted())
    copy = Path(shutil.copytree(photos, tmp_path / "copy"))
    with pytest.raises(ValueError, match="holds an index of the images in "):
        updated(tmp_path / "index", copy, Counted())
    assert ImageIndex.load(tmp_path / "index").images == photos
    for path in photos.rglob("*.png"):
        path.unlink()
    assert updated(tmp_path / "index", copy, Counted()).images == copy  # all of them have moved


def test_one_call_writes_an_index_at_a_time(tmp_path, photos):
    def encode(batch):
        with pytest.raises(DirectoryInUse, match="wait until it has ended"):
            updated(tmp_path / "index", photos, Counted())
        return Counted()(batch)

    assert len(updated(tmp_path / "index", photos, encode).entries) == 6


def test_the_best_images_are_found_in_order(tmp_path, photos):
    index = updated(tmp_path / "index", photos, Counted())
    for results, features in zip(find(index, index.features, 4), index.features, strict=True):
        scores = index.features @ features
        expected = scores.argsort(descending=True)[:4]
        assert [result.path for result in results] == [photos / index.entries[row].name for row in expected]
        assert [result.score for result in results] == pytest.approx(scores[expected].tolist(), abs=1e-5)
    assert len(find(index, index.features[:1], 100)[0]) == 6
    assert [result.score for result in find(index, index.features[:1], 6, 0.999)[0]] == pytest.approx([1])


def test_the_page_has_the_query_the_command_and_whole_pictures_that_link_to_the_files(tmp_path, photos):
    picture(6).resize((32, 32)).save(photos / "<b>.png")
    index = updated(tmp_path / "index", photos, Counted())
    index.entries[-1] = Entry("caf\udce9.png", 0, 0)  # Latin-1 of an old disk, as Python has it
    found = find(index, index.features[:1], 7)[0]
    (photos / "holiday" / "3.png").unlink()
    page = results_page(index, [("a <i>red</i> bicycle", found)], "clipup search index '<u>'")
    assert "<title>a &lt;i&gt;red&lt;/i&gt; bicycle – images of photos</title>" in page
    assert "clipup search index &#39;&lt;u&gt;&#39;</pre>" in page
    assert 'title="holiday/1.png"' in page and ". 1.png</code>" in page
    assert f'href="{(photos / "0.png").as_uri()}"' in page and "object-fit: contain" in page
    assert page.count("data:image/") == 5 and "cannot be read any more" in page
    assert "<i>red</i>" not in page and "<b>.png" not in page and "&lt;b&gt;.png" in page
    assert not re.search(r"src=\"(?!data:)", page) and "caf\ufffd.png" in page
    page.encode("utf-8")


def test_the_page_names_the_folders_and_shows_equal_pictures_once(tmp_path, photos):
    for copy in ("a.png", "b.png"):
        shutil.copy(photos / "0.png", photos / "holiday" / copy)
    index = updated(tmp_path / "index", photos, Counted())
    found = find(index, index.features[:1], 8)[0]
    page = Page(results_page(index, [("q", found), ("nothing", [])], "clipup search index q"))
    assert f"Images of {photos}, 8 searched" in page.text
    assert sum(tag == "figure" for tag, _ in page.elements) == 6
    assert page.text.count("and 2 equal pictures") == 1 and "1.png in holiday" in page.text
    assert not re.search(r"\b[01]\.\d{3}\b", page.text), "no cosine, which says little to people"


def photo(path):
    """A photo as phones store it: an upright half black, half white picture that lies on its side."""
    upright = Image.fromarray(np.repeat(np.uint8([0] * 32 + [255] * 32)[:, None, None], 32, 1).repeat(3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100)
    return upright


def test_photos_are_encoded_and_shown_upright(tmp_path):
    """One with damaged EXIF is taken as it lies."""
    root = tmp_path / "photos"
    root.mkdir()
    upright = to_tensor(photo(root / "a.jpg"))
    Image.new("RGB", (64, 32), "red").save(root / "b.jpg", exif=b"Exif\0\0no header of a TIFF")
    made = updated(tmp_path / "index", root, Counted())
    assert torch.allclose(made.features[0], Counted()(upright[None])[0], atol=0.01) and len(made.entries) == 2
    page = results_page(made, [("a photo", [Result(root / "a.jpg", 0.5)])], "clipup search")
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])))
    assert shown.size == (32, 64) and shown.getpixel((16, 4))[0] < 64 < 192 < shown.getpixel((16, 60))[0]


def test_the_commands_find_what_the_model_finds(tmp_path, photos, model, capsys):
    index, page = str(tmp_path / "index"), tmp_path / "found.html"
    for name in ("a.TIF", "b.NEF"):
        (photos / name).write_bytes(b"")
    options = ["--model", model, "--precision", "fp32", "--workers", "0", "--device", "cpu"]
    assert main(["index", str(photos), index, *options]) == 0
    said = capsys.readouterr()
    assert (
        "Indexed 6 images, skipped 0." in said.out and "pictures of other kinds (2): RAW nef (1), tif (1)" in said.err
    )
    assert main(["search", index, "a red apple", "--count", "3", "--page", str(page), "--device", "cpu"]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
    assert page.read_text().count("<figure>") == 3
    assert f"clipup search {index} 'a red apple' --count 3" in html.unescape(page.read_text())
    plain, _, preprocess = clipup.create_model_and_transforms(model)
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
    with torch.inference_mode():
        text = plain.encode_text(clipup.get_tokenizer(model)(["a red apple"]), normalize=True)
        scores = (plain.encode_image(images, normalize=True) @ text.T).flatten().sort(descending=True).values
    assert [float(score) for score, *_ in found] == pytest.approx(scores[:3].tolist(), abs=1e-3)


@pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="int8 needs the C++ extension")
def test_int8_is_indexed_and_searched_on_the_cpu_of_a_machine_with_a_gpu(tmp_path, photos, model, monkeypatch, capsys):
    index = str(tmp_path / "index")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["index", str(photos), index, "--model", model, "--workers", "0", "--precision", "int8"]) == 0
    assert main(["search", index, "a red apple"]) == 0
    assert capsys.readouterr().out.count(".png") == 6


def test_an_index_reads_large_jpegs_almost_as_the_transform_does(tmp_path, monkeypatch):
    transform = Compose([Resize(8), to_tensor])
    picture(1).resize((301, 203), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=90)
    expected = Counted()(transform(Image.open(tmp_path / "a.jpg"))[None])
    decoded = []

    def observed(content, *options):
        decoded.append(load_image(content, *options))
        return decoded[-1]

    monkeypatch.setattr(images, "load_image", observed)
    records = image_files(tmp_path)
    made = update_index(tmp_path / "index", tmp_path, records, ENCODER, Counted(), transform)
    assert [image.size for image in decoded] == [(11, 8)]
    assert torch.allclose(made.features, expected, atol=0.005)


@pytest.mark.parametrize("damage, error", [(b"{}", ValueError), (None, FileNotFoundError)])
def test_an_incomplete_index_is_refused(tmp_path, damage, error):
    if damage is not None:
        (tmp_path / "index.safetensors").write_bytes(damage)
    with pytest.raises(error, match="clipup index"):
        ImageIndex.load(tmp_path)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config", "transform"])
def test_another_model_tokenizer_or_transform_than_that_of_the_index_is_noticed(tmp_path, photos, capsys, part):
    directory, index = tmp_path / "words", str(tmp_path / "index")
    model, config = save_with_words(directory)
    build = ["index", str(photos), index, "--model", str(directory), "--workers", "0"]
    assert main(build) == main(["search", index, "blue"]) == 0
    path = directory / "open_clip_config.json"
    if part == "weights":
        with torch.no_grad():
            model.visual.proj[0, 0] += 1e-5
        clipup.save_pretrained(model, directory, config, tokenizer_directory=directory)
    elif part == "tokenizer":
        (directory / "vocabulary.txt").write_text("blue\ngreen\nred\n")
    elif part == "transform":
        saved = json.loads(path.read_text())
        saved["preprocess_cfg"]["interpolation"] = "bilinear"
        path.write_text(json.dumps(saved))
    else:
        path.write_text(path.read_text().replace('"heads": 2', '"heads": 4'))
    assert main(["search", index, "blue"]) == main(build) == 2
    assert "weights, config, transform, tokenizer or precision differ" in capsys.readouterr().err


def test_features_that_are_not_finite_are_not_stored(tmp_path, photos):
    os.rename(photos / "0.png", os.fsencode(photos) + b"/bad\xff.png")
    with pytest.raises(ValueError, match="not finite"):
        updated(tmp_path / "index", photos, lambda batch: Counted()(batch) * float("nan"))
    updated(tmp_path / "index", photos, Counted())
    assert len(ImageIndex.load(tmp_path / "index").entries) == 6  # one with a name that is not UTF-8
