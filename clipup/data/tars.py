"""Reading the samples of WebDataset shards; every loss in a damaged file is reported.

A sample consists of consecutive members of a tar file with the same key: `KEY.png`, `KEY.txt`. A key ends at the first
dot of the base name. Links, sparse files and other special members are not read, and nothing is extracted to disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..progress import printable
from .retries import lack, message_of
from .shard_writer import SIZES_FILE

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Image extensions; if a sample has several images, the first in this order is used, as in open_clip."""
TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 2**31 - 1
"""Of a text; what an index has room for."""
TAR = "tar --sort=name --dereference --hard-dereference"
"""The command that writes the files of a directory as samples: side by side, and with content in place of links."""

HEADER_BYTES = 16 * tarfile.BLOCKSIZE
"""Enough for the headers of a member with a long name."""

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as WebDataset splits names
_MARK = 2  # zero blocks that end an archive; more of them pad the last record of 20 blocks
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_MOST_EXTENDED = 1 << 26
"""Bytes of an extended header: of names and the like."""
_SKIPPED_AT_ONCE = 1 << 20
"""Bytes of a member that is not needed, of a shard that is streamed."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class TarSample:
    """Members by extension: their content, where it was read, and their place (offset, size) in the file."""

    key: str
    shard: str
    content: dict[str, bytes] = field(default_factory=dict)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    """Extensions of images and texts that are no regular files, such as links."""
    earlier: int = 0
    """How many earlier samples of the shard have the same key."""

    @property
    def image(self) -> str | None:
        """The extension of its image."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.place), None)

    @property
    def numbered(self) -> str:
        """Its key, with its number where other samples have the same key."""
        return f"{self.key} (number {self.earlier + 1} of that name)" if self.earlier else self.key

    @property
    def named(self) -> str:
        """Its name in messages, by which it is counted."""
        return f"{self.numbered} in {self.shard}"

    def dotted(self) -> list[str]:
        """Extensions of the images that would be samples of their own if their keys ended at the last dot: those with
        a text of the same name, or, where the sample has no image of its own, all."""
        texts = {extension.rpartition(".")[0] for extension in self.place if _kind(extension) in TEXT_EXTENSIONS}
        return [
            extension
            for extension in self.place
            if "." in extension
            and _kind(extension) in IMAGE_EXTENSIONS
            and (self.image is None or extension.rpartition(".")[0] in texts)
        ]


def _kind(name: str) -> str:
    """What follows the last dot."""
    return name.rpartition(".")[2]


def lines(text: str) -> list[str]:
    """The captions of a text with one per line. Only \\n and \\r\\n end a line: a caption may hold what else
    ``str.splitlines`` splits at."""
    return [line.strip() for line in text.split("\n") if line.strip()]


class Complete(NamedTuple):
    """What a complete sample consists of."""

    image: str
    """The extension of its image."""
    text: str
    """The extension of the member with its captions."""
    captions: list[str]
    about: dict
    """The rest of its json."""

    @property
    def several_lines(self) -> bool:
        """Whether its caption is a txt of several lines."""
        return self.text == "txt" and len(lines(self.captions[0])) > 1


def complete(sample: TarSample) -> Complete:
    """The parts of a sample. Captions are `captions` of its json, else one: its txt, as in open_clip.

    Raises ValueError with the reason when it has no caption or no image, or a text that is too large.
    """
    for extension in TEXT_EXTENSIONS:
        size = sample.place.get(extension, (0, 0))[1]
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"its .{extension} has {size} bytes, expected at most {MAX_TEXT_BYTES}")
    about: dict = {}
    try:
        about = dict(json.loads(sample.content.get("json", b"{}")))
    except (ValueError, TypeError, RecursionError):
        pass  # not a JSON object: use the txt
    listed = about.pop("captions", None)
    listed = listed if isinstance(listed, list) else []
    captions = [c for c in listed if isinstance(c, str) and c.strip()]
    text = "json" if captions else "txt"
    if not captions:
        try:
            caption = sample.content.get("txt", b"").decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its .txt is not UTF-8 ({error})") from error
        captions = [caption] if caption.strip() else []
    if sample.image is None:
        raise ValueError(_missing("image", sample.special.intersection(IMAGE_EXTENSIONS)))
    if not captions:
        raise ValueError(_missing("caption", sample.special.intersection(TEXT_EXTENSIONS)))
    return Complete(sample.image, text, captions, about)


def _missing(part: str, special: set[str]) -> str:
    if special:
        return f"its {part} is no regular file but a link or the like: write the shard with {TAR}"
    return f"it has no {part} beside it"


def key_of(member: str) -> str:
    """The key of the sample that a member belongs to."""
    split = _KEY_AND_EXTENSION.fullmatch(member)
    return split[1] if split else member


def name_before_content(headers: bytes) -> str:
    """The name of the member whose content follows these bytes; "" where its header is damaged.

    Names that are long or not ASCII stand in another header before the member's own, which then has only a part of
    them. So the first block counts from which a member is read whose content follows.
    """
    for start in range(len(headers) % tarfile.BLOCKSIZE, len(headers), tarfile.BLOCKSIZE):
        rest = BytesIO(headers[start:])
        with suppress(Exception):  # tarfile has no common class for what a block without header may raise
            member = tarfile.open(fileobj=rest, mode="r:", encoding="utf-8", errors="backslashreplace").next()
            if member is not None and member.offset_data == len(headers) - start:
                return printable(member.name)
    return ""


def read_samples(
    file: BinaryIO,
    shard: str,
    skip: Callable[[str, object, int], None],
    *,
    images: bool,
    expected: int | None = None,
    usual: int = 0,
) -> Iterator[TarSample]:
    """The samples of a shard, complete or not.

    Args:
        file: read once from start to end; must be seekable without `images`.
        skip: called with name, reason and number of samples for what is missing.
        images: whether image contents are read, or only their places. Without them, an OSError is raised: it can be
            another one, or none, when the file is read again. With them it ends the shard, as damage does. Raised in
            any case is one that says what this process lacks, such as MemoryError.
        expected: how many samples the shard should have, where known.
        usual: how many similar shards have, where `expected` is unknown. With 0, `skip` gets 0 samples for a truncated
            shard.
    """
    faults = _Faults()
    found = incomplete = 0
    for sample in _grouped(_members(file, images, faults), shard):
        dotted = sample.dotted()
        if dotted:
            found += len(dotted)
            skip(
                f"images of {sample.named}",
                f"the key of a sample ends at the first dot of its name, so {sample.key}.{dotted[0]} and the like are "
                f"no samples of their own: rename them, such as {sample.key}_{dotted[0]}",
                len(dotted),
            )
        if sample.image is not None or not dotted:
            found, incomplete = found + 1, incomplete + _is_incomplete(sample)
            yield sample
    lost, reason = faults.lost(found, incomplete, expected, usual)
    if lost is not None:
        skip(f"a part of {shard}" if found else shard, reason, lost)


def _grouped(members: Iterator[_Member], shard: str) -> Iterator[TarSample]:
    """Consecutive members with the same key, as samples."""
    seen: Counter[str] = Counter()
    sample: TarSample | None = None
    for member in members:
        key, extension = member.key, member.extension
        if sample is None or key != sample.key or extension in sample.place or extension in sample.special:
            if sample is not None:
                yield sample
            sample = TarSample(key, shard, earlier=seen[key])
            seen[key] += 1
        if member.place is None:
            sample.special.add(extension)
            continue
        sample.place[extension] = member.place
        if member.content is not None:
            sample.content[extension] = member.content
    if sample is not None:
        yield sample


class _Member(NamedTuple):
    """A file in a tar file that belongs to a sample."""

    key: str
    extension: str
    """Lower case."""
    content: bytes | None
    """Of texts that are not too large, and of images where they are read."""
    place: tuple[int, int] | None
    """None for an image or a text that is not a regular file."""


@dataclass
class _Faults:
    """Faults of a tar file: damaged parts with readable members after them, and what ended reading early."""

    damaged: list[str] = field(default_factory=list)
    end: str = ""

    def lost(self, found: int, incomplete: int, expected: int | None, usual: int) -> tuple[int | None, str]:
        """How many samples were lost besides the incomplete ones (None: nothing), and why."""
        reason = self.end or next(iter(self.damaged), "")
        if found and found == expected:
            return None, ""
        if expected is not None and expected > found:
            return expected - found, reason or f"it holds {found} samples, {SIZES_FILE} beside it says {expected}"
        if self.end:  # what the file says is unknown, or too little
            return max(1, usual - found) if usual else 0, reason
        beside = len(self.damaged) - incomplete  # a damaged header loses at least one member of a sample
        return beside if beside > 0 else None, reason


def _is_incomplete(sample: TarSample) -> bool:
    return sample.image is None or not sample.place.keys() & set(TEXT_EXTENSIONS)


def _members(file: BinaryIO, images: bool, faults: _Faults) -> Iterator[_Member]:
    """The files in a tar file that have a key and an extension.

    Damaged headers are skipped (`ignore_zeros`), so that members after them are not lost.
    """
    header = _watched_header()
    members = 0
    read = (*TEXT_EXTENSIONS, *(IMAGE_EXTENSIONS if images else ()))
    end = math.inf
    try:
        if not images:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
        tar = tarfile.open(
            fileobj=file,
            mode="r|" if images else "r:",
            ignore_zeros=True,
            tarinfo=header,
            encoding="utf-8",
            errors="backslashreplace",
        )
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # the stub lacks the list that grows with the file
            members += 1
            member.name = printable(member.name)
            if header.damaged or not _is_padding(header.zeros, member.offset):
                faults.damaged.append(f"{header.lost_bytes()} bytes before {member.name} are damaged")
            header.damaged = header.zeros = 0
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name} is negative")
            regular = member.isreg() and not member.issparse()
            if regular and member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            split = _KEY_AND_EXTENSION.fullmatch(member.name)
            if split is not None:
                key, extension = split[1], split[2].lower()
                if regular:
                    wanted = extension in read and (extension in IMAGE_EXTENSIONS or member.size <= MAX_TEXT_BYTES)
                    content = tar.extractfile(member).read() if wanted else None
                    yield _Member(key, extension, content, (member.offset_data, member.size))
                elif not member.isdir() and extension in (*TEXT_EXTENSIONS, *IMAGE_EXTENSIONS):
                    yield _Member(key, extension, None, None)
            _skip_to_next_header(tar, end)
    except Exception as error:  # readers of URLs raise their own exceptions
        if lack(error) or isinstance(error, OSError) and not images:
            raise
        faults.end = f"{'its rest' if members else 'it'} cannot be read ({message_of(error)})"
        if not members and header.damaged:
            faults.end = _kind_of(header.begins)
        return
    if not members and header.damaged:
        faults.end = _kind_of(header.begins)
    elif header.damaged or header.zeros > _MARK + tarfile.RECORDSIZE // tarfile.BLOCKSIZE:
        faults.end = f"its last {header.lost_bytes()} bytes are damaged"
    elif not header.zeros:
        faults.end = "it has no end-of-archive mark, so it was cut off"


def _skip_to_next_header(tar: tarfile.TarFile, end: float) -> None:
    """Raises ReadError when that is after the end of the file: tarfile would overflow, or skip to it in small steps."""
    file, offset = tar.fileobj, tar.offset  # type: ignore[attr-defined]
    if end == math.inf:
        while file.tell() < offset and file.read(min(offset - file.tell(), _SKIPPED_AT_ONCE)):
            pass
        end = file.tell()
    if offset > end:
        raise tarfile.ReadError("unexpected end of data")


def _is_padding(zeros: int, end: int) -> bool:
    """Whether this many zero blocks before `end` are the end of one of several concatenated archives."""
    record = tarfile.RECORDSIZE // tarfile.BLOCKSIZE
    return zeros in (0, _MARK) or (zeros < _MARK + record and end % tarfile.RECORDSIZE == 0)


class _Header(tarfile.TarInfo):
    """A header class that counts damaged headers, which tarfile skips silently. Each file has a subclass of its own."""

    begins = b""
    damaged = 0
    zeros = 0
    """Zero blocks since the last readable header."""

    @classmethod
    def lost_bytes(cls) -> int:
        return tarfile.BLOCKSIZE * (cls.damaged + cls.zeros)

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        cls.begins = cls.begins or bytes(buf)
        try:
            found = super().frombuf(buf, encoding, errors)
            if found.type in _EXTENDED and found.size > _MOST_EXTENDED:  # which tarfile would read at once
                raise tarfile.InvalidHeaderError("an extended header is damaged")  # type: ignore[attr-defined]  # of the stub
            return found
        except tarfile.HeaderError:
            if buf == bytes(tarfile.BLOCKSIZE):
                cls.zeros += 1
            elif buf:  # not the end of the file
                cls.damaged += 1
            raise


def _watched_header() -> type[_Header]:
    class Header(_Header):
        pass

    return Header


def _kind_of(begins: bytes) -> str:
    for magic, name in _COMPRESSED.items():
        if begins.startswith(magic):
            return f"it is compressed ({name}), expected an uncompressed tar file: decompress it"
    return f"it is not a tar file, it begins with {begins[:16]!r}"
