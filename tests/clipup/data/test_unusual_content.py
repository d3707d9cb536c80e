"""Images of unusual modes and sizes, blank and undecodable captions, stray quotes: streaming and caching agree."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from picture_samples import preprocess, samples_of, tokenizer
from PIL import Image

from clipup.data.images import MAX_PIXELS, load_image
from clipup.data.loaders import eval_samples, train_loader
from clipup.evaluate.datasets import read_lines

KINDS = ("csv", "cached csv", "webdataset", "cached webdataset")


def lengths(texts):
    import torch

    return torch.tensor([[len(text)] for text in texts])


def words(texts):
    """Tokens that say which text it was."""
    import torch

    return torch.tensor([[zlib.crc32(text.encode()) & 0xFFFF] for text in texts])


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def ramp(kind):
    """Values from 0 to full, of a kind of pixels, as a file."""
    steps = np.linspace(0, 1, 16).reshape(4, 4)
    if kind == "16 bit PNG":
        return encoded(Image.fromarray((steps * 65535).astype(np.uint16)))
    if kind == "dark 16 bit PNG":
        return encoded(Image.fromarray((steps * 255).astype(np.uint16)))
    if kind == "16 bit TIFF":
        return encoded(Image.fromarray((steps * 65535).astype(np.uint16)), "TIFF")
    if kind == "32 bit TIFF":
        return encoded(Image.fromarray((steps * 65535).astype(np.int32)), "TIFF")
    if kind == "float TIFF":
        return encoded(Image.fromarray(steps.astype(np.float32)), "TIFF")
    if kind == "float TIFF up to 255":
        return encoded(Image.fromarray((255 * steps).astype(np.float32)), "TIFF")
    return encoded(Image.fromarray((255 * steps).round().astype(np.uint8)))


RAMP = np.rint(np.linspace(0, 255, 16))


@pytest.mark.parametrize(
    "kind", ["8 bit PNG", "16 bit PNG", "16 bit TIFF", "32 bit TIFF", "float TIFF", "float TIFF up to 255"]
)
def test_the_range_of_a_picture_becomes_that_of_8_bits(kind):
    values = np.array(load_image(ramp(kind)))
    assert values.shape == (4, 4, 3)
    assert np.abs(values - RAMP.reshape(4, 4, 1)).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark():
    assert np.array(load_image(ramp("dark 16 bit PNG"))).max() == 1


@pytest.mark.parametrize("values", [[0, np.nan], [-1, 1], [0, 256], [0, np.inf]])
def test_floats_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match="its values range from .*, expected 0 to"):
        load_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def write(pictures, kind, contents):
    """The same samples as a CSV file or as shards: (image, its extension, caption) each."""
    if "csv" in kind:
        rows = ["filepath\ttitle"]
        for n, (content, _, caption) in enumerate(contents):
            (pictures.folder / f"{n}.img").write_bytes(content)
            rows.append(f"{pictures.folder / f'{n}.img'}\t{caption}")
        (pictures.folder / "train.csv").write_text("\n".join(rows) + "\n")
        return {"train_data": pictures.folder / "train.csv"}
    members = []
    for n, (content, extension, caption) in enumerate(contents):
        members += [(f"s{n}.{extension}", content), (f"s{n}.txt", caption.encode())]
    return {"train_data": pictures.tar("train.tar", members)} | (
        {} if "cached" in kind else {"train_num_samples": len(contents)}
    )


def served(pictures, kind, contents, tokenizer=lengths, **options):
    """Images and tokens of an epoch, in no order, and how much was skipped."""
    data = train_loader(
        **write(pictures, kind, contents), preprocess=preprocess, tokenizer=tokenizer, batch_size=1, workers=0,
        cache="cached" in kind, progress=False, max_skipped=0.9, **options,
    )  # fmt: skip
    seen = {
        (image.numpy().tobytes(), int(text))
        for images, texts in data.dataloader
        for image, text in zip(images, texts, strict=True)
    }
    return seen, data.skipped


def test_streamed_and_cached_images_of_every_mode_are_the_same(pictures, picture):
    contents = [
        (ramp(kind), "png", "a caption") for kind in ("8 bit PNG", "16 bit PNG", "dark 16 bit PNG", "float TIFF")
    ]
    found = [served(pictures, kind, contents) for kind in KINDS]
    assert found.count(found[0]) == 4 and len(found[0][0]) >= 2 and found[0][1] == 0  # equal ones are one


@pytest.mark.parametrize("blank", ["", " ", "\u3000", "\xa0 \u2003"])
def test_blank_captions_are_skipped_alike(pictures, picture, blank):
    contents = [(picture(n), "png", blank if n == 1 else "a caption") for n in range(4)]
    found = [served(pictures, kind, contents) for kind in KINDS]
    assert found.count(found[0]) == 4 and len(found[0][0]) == 3 and found[0][1] == 1


@pytest.mark.parametrize("caption", ['a "big" dog', "NA", "null", "007", "1.50", "it's", 'six" nails', "nan", "True"])
def test_captions_are_read_as_they_are_written(pictures, picture, caption):
    contents = [(picture(1), "png", caption)]
    found = [served(pictures, kind, contents, words) for kind in KINDS]
    assert found.count(found[0]) == 4 and found[0][1] == 0
    assert next(iter(found[0][0]))[1] == int(words([caption]))


@pytest.mark.parametrize("cached", [False, True])
def test_of_several_images_of_a_sample_all_loaders_use_the_same_one(pictures, picture, cached):
    members = [("a.png", picture(1)), ("a.jpg", picture(2)), ("a.TXT", b"two images")]
    size = {} if cached else {"train_num_samples": 1}
    path = pictures.tar("train.tar", members)
    data = train_loader(path, preprocess, lengths, 1, 0, cache=cached, progress=False, **size)
    ((images, texts),) = list(data.dataloader)
    assert (int(images[0, 0, 0, 0]), int(texts)) == (2, len("two images"))


@pytest.mark.parametrize("cached", [False, True])
def test_captions_in_json_are_read_alike(pictures, picture, cached):
    members = [("a.png", picture(1)), ("a.json", b'{"captions": ["from\\njson", " ", 3]}')]
    size = {} if cached else {"train_num_samples": 1}
    path = pictures.tar("train.tar", members)
    data = train_loader(path, preprocess, words, 1, 0, cache=cached, progress=False, **size)
    ((_, texts),) = list(data.dataloader)
    assert int(texts) == int(words(["from\njson"]))


@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_a_stray_quote_is_named_and_the_rows_in_it_are_counted(pictures, kind, caplog):
    source = pictures.csv(20)
    image = pictures.folder / "1.png"
    with open(source, "a") as file:
        file.write(f'{image}\t"1 0 begins\n{image}\t1 1\n{image}\t1 1\n{image}\t1 "2" ends\n{image}\t2 1\n')
    data = train_loader(source, preprocess, lengths, 1, 0, cache="cached" in kind, progress=False, max_skipped=0.2)
    assert data.skipped == 4 and data.dataloader.num_batches == 21
    assert "line 22 of" in caplog.text


def rows_with_quotes(folder="", opening=2, closing=None, more=0):
    """A table of twelve pictures, and `more` rows of them. The captions of two rows begin and end with a quote."""
    rows = ["filepath\ttitle"]
    for n in range(12 + more):
        quoted = '"' * (n == opening) + f"{n % 12} {n // 12}" + '"' * (n == closing)
        rows.append(os.path.join(folder, f"{n % 12}.png") + "\t" + quoted)
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("columns", [("filepath", "title"), ("filepath", "title", "source"), ("title", "filepath")])
@pytest.mark.parametrize("kind", ["csv", "cached csv"])
def test_a_missing_quote_among_quoted_cells_loses_no_row_uncounted(pictures, kind, columns):
    pictures.csv(6)
    cells = {"filepath": str(pictures.folder / "{n}.png"), "title": "{n} 0", "source": "web"}
    rows = [",".join(f'"{cells[name].format(n=n)}"' for name in columns) for n in range(6)]
    rows[2] = rows[2].removesuffix('"') if len(columns) == 2 else rows[2].replace('2 0"', "2 0").replace(',"web"', "")
    path = pictures.folder / "quoted.csv"
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")
    data = train_loader(
        path, preprocess, tokenizer, 1, 0, cache=kind != "csv", progress=False, max_skipped=0.9, csv_separator=","
    )
    assert [(picture, caption) for picture, caption, _ in samples_of(data.dataloader) if picture != caption] == []
    assert (data.dataloader.num_batches, data.skipped) == (4, 2)


def test_cells_of_several_lines_are_no_rows_whatever_follows_them(pictures):
    """The last line of such a cell alone may look like a row with another image, here that of a mask."""
    pictures.csv(4)
    image, mask = (pictures.folder / f"{n}.png" for n in (1, 2))
    path = pictures.folder / "masks.csv"
    path.write_text(f'id,filepath,title,mask\n1,{image},"two\nlines",{mask}\n2,{image},one,{mask}\n')
    data = train_loader(path, preprocess, tokenizer, 1, 0, progress=False, csv_separator=",")
    assert (data.order["rows"], data.skipped) == (2, 0)


def test_rows_in_a_quote_of_more_than_a_reader_takes_are_counted(pictures, caplog):
    pictures.csv(12)
    path = pictures.folder / "quotes.tsv"
    path.write_text(rows_with_quotes(pictures.folder, more=8000))
    data = train_loader(path, preprocess, tokenizer, 1, 0, progress=False, max_skipped=0.9)
    assert data.order["rows"] + data.skipped == 8012 and data.skipped > 1000
    assert "line 4 of" in caplog.text


def test_a_text_that_is_not_utf8_is_named(pictures, picture, caplog, tmp_path):
    members = [(name, content) for n in range(3) for name, content in ((f"{n}.png", picture(n)), (f"{n}.txt", b"good"))]
    members[3] = ("1.txt", b"caf\xe9")
    path = pictures.tar("train.tar", members)
    for options in ({"cache": True}, {"train_num_samples": 3}):
        caplog.clear()
        data = train_loader(path, preprocess, lengths, 1, 0, progress=False, max_skipped=0.5, **options)
        assert len(list(data.dataloader)) >= 2
        assert data.skipped == 1 and f"skipped 1 in {path}: " in caplog.text

    source = pictures.csv(4)
    with open(source, "ab") as file:
        file.write(f"{pictures.folder / '1.png'}\tcaf".encode() + b"\xe9\n")
    for cached in (False, True):
        with pytest.raises(ValueError, match=r"train_data: .*train\.csv is not UTF-8 text .*convert it"):
            train_loader(source, preprocess, lengths, 1, 0, cache=cached)
    with pytest.raises(ValueError, match=r"source: .*train\.csv is not UTF-8 text"):
        eval_samples(source, preprocess)
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text"):
        read_lines(tmp_path / "classes.txt")


def test_a_byte_order_mark_is_not_part_of_the_first_column(pictures):
    source = pictures.csv(4)
    with open(source, "rb") as file:
        content = file.read()
    with open(source, "wb") as file:
        file.write(b"\xef\xbb\xbf" + content)
    assert train_loader(source, preprocess, lengths, 2, 0).dataloader.num_batches == 2


def test_the_separator_may_be_an_escaped_tab(pictures):
    assert train_loader(pictures.csv(4), preprocess, lengths, 2, 0, csv_separator="\\t").dataloader.num_batches == 2
    with pytest.raises(ValueError, match="csv_separator: got '||', expected one character"):
        train_loader(pictures.csv(4), preprocess, lengths, 2, 0, csv_separator="||")


def large_png(width, height):
    """A PNG of that many pixels that takes a few bytes: its header says so, and no data follow."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 30_000, 100_000])
def test_the_limit_on_pixels_is_checked_before_decoding(side):
    message = rf"its {side} x {side} pixels exceed the limit of {MAX_PIXELS} \(max_image_pixels\)"
    with pytest.raises(ValueError, match=message):
        load_image(large_png(side, side))


def test_the_limit_on_pixels_can_exceed_pillows_which_is_unchanged(picture):
    with pytest.raises(OSError):  # what is missing is the data
        load_image(large_png(30_000, 30_000), max_pixels=10**9)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(large_png(30_000, 30_000)))


@pytest.mark.parametrize("size", [(1, 201), (100_000, 400)])
def test_the_limit_on_the_shape_is_checked_before_decoding(size):
    width, height = size
    with pytest.raises(ValueError, match=rf"its {width} x {height} pixels exceed the limit of 200:1 on the shape"):
        load_image(large_png(*size))
    assert load_image(encoded(Image.new("L", (200, 1)))).size == (200, 1)


class Full:
    """A transform that fails, in one of several ways, for the picture with the red 2."""

    def __init__(self, error):
        self.error = error

    def __call__(self, image):
        if image.getpixel((0, 0))[0] == 2:
            raise self.error
        return preprocess(image)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [*KINDS, "streamed", "evaluation"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "no space"), ZeroDivisionError("division by zero")])
def test_an_error_of_preprocess_names_the_image(pictures, picture, kind, error, workers):
    contents = [(picture(n), "png", f"{n} 0") for n in range(3)]
    source, options = write(pictures, kind, contents)["train_data"], {"progress": False, "cache": "cached" in kind}
    with pytest.raises((type(error), ValueError), match=r"\(preprocess of .*(s2 in .*train\.tar|2\.img)\)"):
        if kind == "evaluation":
            list(eval_samples(source, Full(error)).batches(1, workers))
        else:
            if kind == "streamed":
                source, options = f"file:{source}", {"train_num_samples": 3}
            list(train_loader(source, Full(error), tokenizer, 1, workers, **options).dataloader)
