"""Images of unusual modes and sizes, and CSV files of spreadsheets."""

import struct
import zlib

import numpy as np
import pytest
from picture_samples import encoded, epoch_of, load
from PIL import Image

from clipup.data.images import MAX_PIXELS, load_image

STEPS = np.linspace(0, 1, 16).reshape(4, 4)


@pytest.mark.parametrize(
    "values, kind, full",
    [
        ((STEPS * 255).round().astype(np.uint8), "PNG", 255),
        ((STEPS * 65535).astype(np.uint16), "PNG", 255),
        ((STEPS * 255).astype(np.uint16), "PNG", 1),  # a dark picture stays dark
        ((STEPS * 65535).astype(np.uint16), "TIFF", 255),
        ((STEPS * 65535).astype(np.int32), "TIFF", 255),
        (STEPS.astype(np.float32), "TIFF", 255),
        ((255 * STEPS).astype(np.float32), "TIFF", 255),
    ],
)
def test_the_range_of_a_picture_becomes_that_of_8_bits(values, kind, full):
    found = np.array(load_image(encoded(Image.fromarray(values), kind)))
    assert found.shape == (4, 4, 3)
    assert np.abs(found - np.rint(full * STEPS)[:, :, None]).max() <= 1


@pytest.mark.parametrize("values", [[0, np.nan], [-1, 1], [0, 256]])
def test_floats_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match="its values range"):
        load_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def large_png(width, height):
    """A PNG of that many pixels that takes a few bytes: its header says so, and no data follow."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(13_000, 13_000), (100_000, 100_000), (1, 201), (100_000, 400)])
def test_pixels_and_shape_are_limited_before_decoding(size):
    with pytest.raises(ValueError, match="exceed the limit"):
        load_image(large_png(*size))
    assert load_image(encoded(Image.new("L", (200, 1)))).size == (200, 1)


def test_the_limit_on_pixels_can_exceed_pillows_which_is_unchanged():
    with pytest.raises(OSError):  # what is missing is the data
        load_image(large_png(30_000, 30_000), max_pixels=10**9)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def table(pictures, content, **options):
    """The rows that are read of a CSV file beside four pictures, and how many were skipped."""
    pictures.csv(4)
    path = pictures.folder / "table.csv"
    path.write_bytes(content.replace("DIR", str(pictures.folder)).encode())
    data = load("csv", path, 1, max_skipped=0.9, **options)
    assert all(picture == caption for picture, caption, _ in epoch_of(data))
    return data.order["rows"], data.skipped


QUOTED = '"filepath";"title"\r\n' + "".join(f'"DIR/{n}.png";"{n} 0"\r\n' for n in range(4))


@pytest.mark.parametrize(
    "content, separator, found",
    [
        ("\ufeff" + QUOTED, ";", (4, 0)),  # of a spreadsheet
        (QUOTED.replace(";", ","), ",", (4, 0)),
        (QUOTED.replace(";", "\t"), "\\t", (4, 0)),
        (QUOTED.replace('2 0"', "2 0"), ";", (2, 2)),  # a quote that is not closed takes in the next row
        ('id,filepath,title,mask\n1,DIR/1.png,"1\n0",DIR/2.png\n2,DIR/1.png,1 0,DIR/2.png\n', ",", (2, 0)),
        (
            QUOTED.replace('"', "") + 'DIR/1.png;"1 0 begins\nDIR/1.png;1 1\nDIR/1.png;1 "2" ends\nDIR/2.png;2 1\n',
            ";",
            (5, 3),
        ),
    ],
)
def test_tables_of_spreadsheets_are_read_and_rows_in_an_open_quote_are_counted(pictures, content, separator, found):
    assert table(pictures, content, csv_separator=separator) == found


def test_a_quote_that_takes_in_the_rest_of_a_file_is_named_with_its_line(pictures):
    with pytest.raises(ValueError, match=r"train_data: line 3 of .*table\.csv"):
        table(pictures, 'filepath\ttitle\nDIR/1.png\t1 0\nDIR/1.png\t"1 0\n' + "DIR/2.png\t2 0\n" * 20_000)
