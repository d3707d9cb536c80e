"""Rows of CSV files: image paths and captions, and what is wrong with rows that cannot be used.

A CSV file is the user's own list and may name images anywhere; relative paths start from the working directory. A CSV
file that belongs to a directory may only name images in that directory.
"""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from .retries import RETRIES, Retries, SourceError
from .skips import Skips
from .tars import lines


class CsvFormat(NamedTuple):
    """The column separator, and the columns with image paths and captions."""

    separator: str = "\t"
    img_key: str = "filepath"
    caption_key: str = "title"


class Row(NamedTuple):
    """A usable row: its first line, the path of its image, and its captions (one per line)."""

    line: int
    image: str
    captions: str


def row_name(path: str, line: int, image: str) -> str:
    """The name of a row in messages."""
    return f"line {line} of {path}" + f" ({image})" * bool(image)


def readable_rows(
    path: str,
    form: CsvFormat,
    skips: Skips,
    argument: str,
    directory: str | os.PathLike | None = None,
    retries: int = RETRIES,
) -> Iterator[Row]:
    """The usable rows; the others are noted in `skips`. With `directory`, paths are relative to it.

    Skipped are rows without image or caption, rows whose image is missing or empty, rows with too many cells, and rows
    that an unclosed quote takes into its cell.

    Raises FileNotFoundError for a missing file, and ValueError for a missing column or text that is not UTF-8, each
    naming the argument.
    """
    retried = Retries(retries, skips)
    with open(_file(path, argument), encoding="utf-8-sig", newline="") as file:
        for line, image, caption, fault, count in _rows(file, path, form, argument, directory or os.curdir):
            name = row_name(path, line, image)
            if not fault and directory is not None and leaves(image):
                fault = f"its image is not in {directory}"
            elif directory is not None and image:
                image = os.path.join(directory, image)
            if not fault and not image:
                fault = "it has no image"
            elif not fault and not lines(caption):
                fault = "it has no caption"
            elif not fault:
                fault = _file_fault(image, name, retried)
            if fault:
                skips.note(name, fault, count)
            else:
                yield Row(line, image, caption)


def check_columns(path: str, form: CsvFormat, argument: str) -> None:
    """Raises what `readable_rows` raises, but reads the header only."""
    with open(_file(path, argument), encoding="utf-8-sig", newline="") as file:
        _header(_cells(file, path, form, argument), path, form, argument)


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a directory leads out of it, judged by its text."""
    return os.path.isabs(path) or os.pardir in path.replace("\\", "/").split("/")


def _file(path: str, argument: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected a CSV file with images and captions")
    return path


def _file_fault(image: str, name: str, retried: Retries) -> str:
    try:
        state = retried(lambda: name, lambda: os.stat(image))
    except SourceError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return f"its image cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(state.st_mode):
        return "its image is not a file"
    return "" if state.st_size else "its image is an empty file"


def _rows(
    file: TextIO, path: str, form: CsvFormat, argument: str, directory: str | os.PathLike
) -> Iterator[tuple[int, str, str, str, int]]:
    """Line, image, caption, fault ("" for none), and the number of rows it stands for."""
    cells = _cells(file, path, form, argument)
    image_column, caption_column, columns = _header(cells, path, form, argument)
    separator = _separator(form.separator)

    def rows_in(texts: Sequence[str]) -> int:
        """How many of the later lines of a row look like rows."""
        return sum(_looks_like_row(text, separator, image_column, directory) for text in texts)

    for line, row, fault in cells:
        if fault:
            swallowed = rows_in(row)
            if swallowed:
                fault = _unclosed(swallowed)
            yield line, "", "", fault, 1 + swallowed
            continue
        if not any(cell.strip() for cell in row):
            continue  # a blank line
        image, caption = ((row[c] if c < len(row) else "") for c in (image_column, caption_column))
        swallowed = sum(rows_in(_later(cell)) for cell in row)
        if swallowed:
            fault = _unclosed(swallowed)
        elif any(row[columns:]):
            fault = f"it has {len(row)} cells, the header has {columns}: quote cells that contain the separator"
        yield line, "" if swallowed else image, caption, fault, 1 + swallowed


def _cells(file: TextIO, path: str, form: CsvFormat, argument: str) -> Iterator[tuple[int, list[str], str]]:
    """First line, cells and fault ("" for none) of every row. With a fault, its lines after the first in place of its
    cells."""
    read: list[str] = []

    def noted() -> Iterator[str]:
        for text in file:
            read.append(text)
            yield text

    reader = csv.reader(noted(), delimiter=_separator(form.separator))
    while True:
        line = reader.line_num + 1
        read.clear()
        try:
            yield line, next(reader), ""
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{argument}: {path} is not UTF-8 text ({error.reason}): convert it, such as with `iconv -t UTF-8`"
            ) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error  # a failed read does not name its file
        except csv.Error as error:  # a NUL (before Python 3.11), or a quote that opens a cell of more than 128 KiB
            yield line, read[1:], str(error)


def _header(
    cells: Iterator[tuple[int, list[str], str]], path: str, form: CsvFormat, argument: str
) -> tuple[int, int, int]:
    """The indices of the image and caption columns, and the number of columns."""
    _, columns, fault = next(cells, (0, [], ""))
    if fault:
        raise ValueError(f"{argument}: {path} has no readable header: {fault}")
    if not columns:
        raise ValueError(f"{argument}: {path} is empty, expected a header and rows")
    for option, column in (("csv_img_key", form.img_key), ("csv_caption_key", form.caption_key)):
        if column not in columns:
            raise ValueError(
                f"{option}: {path} has no column {column!r}, its columns are {columns}: correct {option}, "
                f"or csv_separator (now {form.separator!r})"
            )
    return columns.index(form.img_key), columns.index(form.caption_key), len(columns)


def _unclosed(swallowed: int) -> str:
    return f"its quote is not closed and takes in {swallowed} more rows: close the quote, or double it"


def _separator(given: str) -> str:
    separator = "\t" if given == "\\t" else given  # as typed in a shell
    if len(separator) != 1:
        raise ValueError(f"csv_separator: got {given!r}, expected one character")
    return separator


def _later(cell: str) -> list[str]:
    """The lines of a cell after its first."""
    return cell.splitlines()[1:] if "\n" in cell or "\r" in cell else []


def _looks_like_row(text: str, separator: str, image_column: int, directory: str | os.PathLike) -> bool:
    cells = text.rstrip("\r\n").split(separator)
    return image_column < len(cells) > 1 and os.path.isfile(os.path.join(directory, cells[image_column]))
