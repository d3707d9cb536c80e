"""Rows of CSV files: image paths and captions, and what is wrong with rows that cannot be used.

A CSV file is the user's own list and may name images anywhere; relative paths start from the working directory. A CSV
file that belongs to a directory may only name images in that directory.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import checks
from ..progress import printable
from .skips import RETRIES, Retries, Skips, read_whole

_MOST_SHOWN = 200
"""Characters of the path of an image in a message."""


class CsvFormat(NamedTuple):
    """The column separator, and the columns with image paths and captions."""

    separator: str = "\t"
    img_key: str = "filepath"
    caption_key: str = "title"


class Row(NamedTuple):
    """A usable row: its first line, the path of its image, and its caption."""

    line: int
    image: str
    caption: str


def row_name(path: str, line: int, image: str) -> str:
    """The name of a row in messages."""
    return printable(f"line {line} of {path} ({image[:_MOST_SHOWN]})")


def readable_rows(
    path: str,
    form: CsvFormat,
    skips: Skips,
    argument: str,
    directory: str | os.PathLike | None = None,
    retries: int = RETRIES,
) -> Iterator[Row]:
    """The usable rows; the others are noted in `skips`. With `directory`, paths are relative to it.

    Skipped are rows without image or caption, rows whose image is missing, rows with too many cells, and rows with a
    cell of several lines that contains the separator: an unclosed quote takes rows into its cell. All lines of such a
    row are counted.

    Raises FileNotFoundError for a missing file, OSError for one that cannot be read, also after `retries` further
    tries, and ValueError for a missing column or text that is not UTF-8, each naming the argument.
    """
    separator = "\t" if form.separator == "\\t" else form.separator  # as typed in a shell
    checks.check("csv_separator", separator, len(separator) == 1, "one character")
    records = _records(_text(path, argument, Retries(retries, skips)), separator)
    _, _, header, _ = next(records, (0, 0, [], ""))
    for option, column in (("csv_img_key", form.img_key), ("csv_caption_key", form.caption_key)):
        if column not in header:
            raise ValueError(
                f"{option}: {path} has no column {column!r}, its columns are {checks.shown(header)}: correct {option}, "
                f"or csv_separator (now {form.separator!r})"
            )
    image_column, caption_column = header.index(form.img_key), header.index(form.caption_key)
    for line, count, cells, fault in records:
        if not fault and not any(cell.strip() for cell in cells):
            continue  # a blank line
        padded = [*cells, *[""] * len(header)]
        image, caption = padded[image_column], padded[caption_column]
        name = row_name(path, line, image)
        if any(separator in cell and "\n" in cell for cell in cells):
            fault = "a cell of several lines contains the separator: close its quote, or write it in one line"
        elif any(cells[len(header) :]):
            fault = f"it has {len(cells)} cells, the header has {len(header)}: quote cells that contain the separator"
        if fault:
            skips.note(name, fault, count)
            continue
        if directory is not None and leaves(image):
            fault = f"its image is not in {directory}"
        elif directory is not None:
            image = os.path.join(directory, image)
        if not fault and not os.path.isfile(image):
            fault = "its image is no file that can be opened"
        elif not fault and not caption.strip():
            fault = "it has no caption"
        if fault:
            skips.note(name, fault)
        else:
            yield Row(line, image, caption)


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a directory leads out of it, judged by its text."""
    return os.path.isabs(path) or os.pardir in path.replace("\\", "/").split("/")


def _text(path: str, argument: str, retried: Retries) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected a CSV file with images and captions")
    content = read_whole(Path(path).read_bytes, path, argument, retried)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: {path} is not UTF-8 text ({error.reason}): convert it, such as with `iconv -t UTF-8`"
        ) from error


def _records(text: str, separator: str) -> Iterator[tuple[int, int, list[str], str]]:
    """Of each row: its first line, how many lines it has, its cells, and what is wrong with it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    while True:
        line, cells, fault = reader.line_num, [], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that opens a cell of more than 128 KiB
            fault = f"{error}: close its quote"
        yield line + 1, reader.line_num - line, cells, fault
