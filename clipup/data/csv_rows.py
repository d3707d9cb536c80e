"""Rows of CSV files: image paths and captions, and what is wrong with rows that cannot be used.

A CSV file is the user's own list and may name images anywhere; relative paths start from the working directory. A CSV
file that belongs to a directory may only name images in that directory.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from .. import checks
from ..progress import printable
from .retries import RETRIES, Retries, SourceError
from .shard_names import FileState, check_state, state_of
from .skips import Skips

if TYPE_CHECKING:
    from typing_extensions import Buffer as WriteableBuffer


_READ_AT_ONCE = 1 << 20
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
    shown = image if len(image) <= _MOST_SHOWN else f"{image[:_MOST_SHOWN]}..."
    return printable(f"line {line} of {path}" + f" ({shown})" * bool(image))


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

    Raises FileNotFoundError for a missing file, OSError for one that cannot be read, also after `retries` further
    tries, and ValueError for a missing column or text that is not UTF-8, each naming the argument.
    """
    retried = Retries(retries, skips)
    with _opened(path, argument, retried) as file:
        for line, image, caption, fault, count in _rows(file, path, form, argument, directory or os.curdir):
            name = row_name(path, line, image)
            if not fault and directory is not None and leaves(image):
                fault = f"its image is not in {directory}"
            elif directory is not None and image:
                image = os.path.join(directory, image)
            if not fault and not image:
                fault = "it has no image"
            elif not fault and not caption.strip():
                fault = "it has no caption"
            elif not fault:
                fault = _file_fault(image, name, retried)
            if fault:
                skips.note(name, fault, count)
            else:
                yield Row(line, image, caption)


def check_columns(path: str, form: CsvFormat, argument: str, retries: int = RETRIES) -> None:
    """Raises what `readable_rows` raises, but reads the header only."""
    with _opened(path, argument, Retries(retries, Skips())) as file:
        _header(_records(file, path, form, argument), path, form, argument)


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a directory leads out of it, judged by its text."""
    return os.path.isabs(path) or os.pardir in path.replace("\\", "/").split("/")


def _opened(path: str, argument: str, retried: Retries) -> TextIO:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}; expected a CSV file with images and captions")
    file = _LargeReads(_ReadAgain(path, retried), _READ_AT_ONCE)
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


class _LargeReads(io.BufferedReader):
    """Gives a TextIOWrapper, which asks for 8 KiB and so would open the file for each, all that one read gives."""

    def read1(self, size: int = -1, /) -> bytes:
        return super().read1(_READ_AT_ONCE)


class _ReadAgain(io.RawIOBase):
    """A file that is opened for every read, so that a read that failed can be repeated.

    Raises SourceError when it changes meanwhile.
    """

    def __init__(self, path: str, retried: Retries) -> None:
        self._path, self._retried = path, retried
        self._offset = 0
        self._state: FileState | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer) as view:
            content = self._retried(lambda: self._path, lambda: self._read(len(view)))
            view[: len(content)] = content
        self._offset += len(content)
        return len(content)

    def _read(self, size: int) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            self._state = self._state or state_of(file.fileno())
            check_state(file.fileno(), self._state, self._path)
            file.seek(self._offset)
            return file.read(size)


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


class _Record(NamedTuple):
    """What the CSV reader takes for a row."""

    line: int
    """Its first."""
    cells: list[str]
    """None with a fault."""
    fault: str
    lines: list[str]
    """As they are in the file."""


def _rows(
    file: TextIO, path: str, form: CsvFormat, argument: str, directory: str | os.PathLike
) -> Iterator[tuple[int, str, str, str, int]]:
    """Line, image, caption, fault ("" for none), and the number of rows it stands for."""
    records = _records(file, path, form, argument)
    image_column, caption_column, columns = _header(records, path, form, argument)
    separator = _separator(form.separator)

    def image_of(line: str) -> str:
        """The image of a line that is a row; "" for other lines."""
        try:
            cells = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:
            return ""
        return cells[image_column] if image_column < len(cells) > 1 else ""

    def rows_within(record: _Record, image: str) -> int:
        """How many lines of a record look like rows, its first and the one with its own image aside."""
        if len(record.lines) < 2:
            return 0
        first, *later = record.lines
        # An odd quote begins a cell of several lines or ends one: what follows it is no row
        images = [image_of(first), *(image_of(one.partition('"')[0] if one.count('"') % 2 else one) for one in later)]
        if image in images:
            images[images.index(image)] = ""
        return sum(bool(one) and os.path.isfile(os.path.join(directory, one)) for one in images[1:])

    for record in records:
        if not record.fault and not any(cell.strip() for cell in record.cells):
            continue  # a blank line
        image, caption = (
            (record.cells[column] if column < len(record.cells) else "") for column in (image_column, caption_column)
        )
        fault, swallowed = record.fault, rows_within(record, image)
        if swallowed:
            fault = _unclosed(swallowed)
        elif any(record.cells[columns:]):
            fault = (
                f"it has {len(record.cells)} cells, the header has {columns}: quote cells that contain the separator"
            )
        yield record.line, "" if swallowed else image, caption, fault, 1 + swallowed


def _records(file: TextIO, path: str, form: CsvFormat, argument: str) -> Iterator[_Record]:
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
            cells, fault = next(reader), ""
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{argument}: {path} is not UTF-8 text ({error.reason}): convert it, such as with `iconv -t UTF-8`"
            ) from error
        except OSError as error:
            raise OSError(
                f"{argument}: {path} cannot be read ({error}): repair the disk or the mount, or copy the file again"
            ) from error
        except csv.Error as error:  # a NUL (before Python 3.11), or a quote that opens a cell of more than 128 KiB
            cells, fault = [], str(error)
        yield _Record(line, cells, fault, list(read))


def _header(records: Iterator[_Record], path: str, form: CsvFormat, argument: str) -> tuple[int, int, int]:
    """The indices of the image and caption columns, and the number of columns."""
    _, columns, fault, text = next(records, _Record(0, [], "", []))
    if fault:
        raise ValueError(f"{argument}: {path} has no readable header: {fault}")
    if not columns:
        raise ValueError(f"{argument}: {path} is empty, expected a header and rows")
    for option, column in (("csv_img_key", form.img_key), ("csv_caption_key", form.caption_key)):
        if column not in columns:
            more = len(text) - 1
            quote = f"; a quote in it takes in {more} more lines: close it" if more else ""
            raise ValueError(
                f"{option}: {path} has no column {column!r}, its columns are {checks.shown(columns)}: correct "
                f"{option}, or csv_separator (now {form.separator!r}){quote}"
            )
    return columns.index(form.img_key), columns.index(form.caption_key), len(columns)


def _unclosed(swallowed: int) -> str:
    return f"its quote is not closed and takes in {swallowed} more rows: close the quote, or double it"


def _separator(given: str) -> str:
    separator = "\t" if given == "\\t" else given  # as typed in a shell
    if len(separator) != 1:
        raise ValueError(f"csv_separator: got {given!r}, expected one character")
    return separator
