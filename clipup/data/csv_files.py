"""CSV files: rows of image paths and captions, and what is wrong with rows that cannot be used.

A CSV file is the user's own list and may name images anywhere; relative paths start from the working directory. A CSV
file that belongs to a directory may only name images in that directory.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import checks
from ..option_group import OptionGroup, Resumed, option
from ..progress import printable
from .samples import PackedTexts, Sample, digest_of
from .skips import RETRIES, Note, Retries, Skips, read_whole

_MOST_SHOWN = 200
"""Characters of the path of an image in a message."""


@dataclass(kw_only=True)
class CsvOptions(OptionGroup):
    """The columns of a CSV file."""

    csv_separator: str = option(r"\t", Resumed.MEASURED)
    r"""Separates the columns of a CSV file; \t is a tab."""
    csv_img_key: str = option("filepath", Resumed.MEASURED)
    """Column with the paths of the images."""
    csv_caption_key: str = option("title", Resumed.MEASURED)
    """Column with the captions. A cell is one caption, whatever it holds."""


class CsvSource:
    """The usable rows of a CSV file, for training."""

    def __init__(self, path: str, form: CsvOptions, skips: Skips, retries: int = RETRIES) -> None:
        self.path = path
        self.lines, self.images, self.captions = array("q"), PackedTexts(), PackedTexts()
        for line, image, caption in readable_rows(path, form, skips, "train_data", retries=retries):
            self.lines.append(line)
            self.images.append(image)
            self.captions.append(caption)
        self.digest = digest_of(self.lines, self.captions.content, self.captions.ends)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return _row_name(self.path, self.lines[row], self.images[row])

    def read(self, row: int) -> tuple[bytes, list[str]]:
        return Path(self.images[row]).read_bytes(), [self.captions[row]]


def csv_samples(
    path: str, form: CsvOptions, skips: Skips, argument: str, directory: str | os.PathLike | None = None
) -> list[Sample]:
    """The images of a CSV file, for evaluation; the rows of an image are its captions.

    Args:
        directory: which paths are relative to; they may not lead out of it.
    """
    captions: dict[str, tuple[str, list[str]]] = {}
    for _, image, caption in readable_rows(path, form, skips, argument, directory, of_images=True):
        captions.setdefault(os.path.abspath(image), (image, []))[1].append(caption)
    return [
        Sample(image, image, tuple(dict.fromkeys(of_image)), metadata={"key": image})
        for image, of_image in captions.values()
    ]


def readable_rows(
    path: str,
    form: CsvOptions,
    skips: Skips,
    argument: str,
    directory: str | os.PathLike | None = None,
    retries: int = RETRIES,
    of_images: bool = False,
) -> Iterator[tuple[int, str, str]]:
    """The usable rows: first line, path of the image, caption. The others are noted in `skips`; with `of_images`, a
    missing image is noted once. With `directory`, paths are relative to it.

    Skipped are rows without image or caption, rows whose image is missing, rows with too many cells, and rows with a
    cell that holds other rows, because of an unclosed quote. All lines of such a row are counted.

    Raises FileNotFoundError for a missing file, OSError for a file that cannot be read, also after `retries` further
    tries, and ValueError for a missing column, text that is not UTF-8, or a quote that is not closed within 128 KiB.
    """
    separator = "\t" if form.csv_separator == "\\t" else form.csv_separator  # as typed in a shell
    checks.check("csv_separator", separator, len(separator) == 1, "one character")
    records = _records(path, argument, separator, Retries(retries))
    _, _, header = next(records, (0, 0, []))
    for name, column in {"csv_img_key": form.csv_img_key, "csv_caption_key": form.csv_caption_key}.items():
        if column not in header:
            raise ValueError(
                f"{name}: {path} has no column {column!r}, its columns are {checks.shown(header)}: "
                f"correct {name}, or csv_separator (now {separator!r})"
            )
    image_column, caption_column = header.index(form.csv_img_key), header.index(form.csv_caption_key)
    missing: set[str] = set()
    notes: list[Note] = []
    base = printable(os.path.abspath(directory or ""))
    for line, count, cells in records:
        if not any(map(str.strip, cells)):
            continue  # a blank line
        padded, fault, lost = [*cells, *[""] * len(header)], "", count
        image, caption = padded[image_column], padded[caption_column]
        file = image if directory is None else os.path.join(directory, image)
        if any(_holds_a_row(cell, separator, image_column, directory) for cell in cells):
            fault = "a cell holds other rows: close its quote"
        elif any(cells[len(header) :]):
            fault = f"it has {len(cells)} cells, the header has {len(header)}: quote cells that contain the separator"
        elif directory is not None and leaves(image):
            fault, lost = f"its image is not in {directory}", 1
        elif not os.path.isfile(file):
            fault, lost = f"there is no such file; relative paths start from {base}", 1
            if of_images and file in missing:
                continue
            missing.add(file)
        elif not caption.strip():
            fault, lost = "it has no caption", 1
        if fault:
            notes.append(Note(_row_name(path, line, image), fault, lost))
        else:
            yield line, file, caption
    skips.add(notes)


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a directory leads out of it, judged by its text."""
    return os.path.isabs(path) or os.pardir in path.replace("\\", "/").split("/")


def _row_name(path: str, line: int, image: str) -> str:
    return printable(f"line {line} of {path} ({image[:_MOST_SHOWN]})")


def _records(path: str, argument: str, separator: str, retried: Retries) -> Iterator[tuple[int, int, list[str]]]:
    """The first line, number of lines and cells of each row."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected a CSV file with images and captions")
    content = read_whole(Path(path).read_bytes, path, argument, retried)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"
        raise ValueError(
            f"{argument}: {path} is not UTF-8 text ({error.reason}): save it as UTF-8, or convert it, such as with "
            f"`iconv -f {encoding} -t UTF-8`"
        ) from error
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator), 0
    try:
        for cells in reader:
            yield line + 1, reader.line_num - line, cells
            line = reader.line_num
    except csv.Error as error:  # a quote that opens a cell of more than 128 KiB
        raise ValueError(f"{argument}: line {line + 1} of {path}: {error}: close its quote") from error


def _holds_a_row(cell: str, separator: str, image_column: int, directory: str | os.PathLike | None) -> bool:
    """Whether a line of the cell has the path of a file in the column of images. Captions may have several lines, with
    separators."""
    rows = (line.split(separator) for line in cell.split("\n")) if "\n" in cell and separator in cell else ()
    return any(os.path.isfile(os.path.join(directory or "", *row[image_column : image_column + 1])) for row in rows)
