"""Reading the samples of WebDataset shards; what a damaged file lost is reported.

A sample consists of consecutive members of a tar file with the same key: `KEY.png`, `KEY.txt`. A key ends at the first
dot of the base name. Links, sparse files and other special members are not read, and nothing is extracted to disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..progress import printable
from .shard_writer import SIZES_FILE
from .skips import raise_lack

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Image extensions; if a sample has several images, the first in this order is used, as in open_clip."""
TEXT_EXTENSIONS = ("txt", "json", "cls")
TAR = "tar --sort=name --dereference --hard-dereference"
"""The command that writes the files of a directory as samples: side by side, and with content in place of links."""

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as WebDataset splits names
_END_BLOCKS = 2
"""Zero blocks that end an archive; more of them pad the last record of 20 blocks."""
_RECORD_BLOCKS = tarfile.RECORDSIZE // tarfile.BLOCKSIZE


@dataclass
class Members:
    """Of one sample, by extension: their content, where it was read, and their place (offset, size) in the file."""

    key: str
    shard: str
    offset: int
    """Of the first one."""
    content: dict[str, bytes] = field(default_factory=dict)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The extension of the image."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.place), None)

    @property
    def named(self) -> str:
        """The sample's name in messages."""
        return f"{self.key} in {self.shard}"

    @property
    def counted_as(self) -> str:
        """By which the sample is counted: several can have the same key."""
        return f"byte {self.offset} of {self.shard}"


def lines(text: str) -> list[str]:
    """The captions of a text with one per line. Only \\n and \\r\\n end a line: a caption may hold what else
    ``str.splitlines`` splits at."""
    return [line.strip() for line in text.split("\n") if line.strip()]


class Parts(NamedTuple):
    """What a complete sample consists of."""

    image: str
    """The extension of its image."""
    text: str
    """The extension of the member with its captions."""
    captions: list[str]
    about: dict
    """The rest of its json."""


def complete(members: Members) -> Parts:
    """The parts of a sample. Captions are `captions` of its json, else one: its txt, as in open_clip.

    Raises ValueError with the reason when it has no caption or no image.
    """
    if members.image is None:
        raise ValueError(f"it has no image beside it (links are not read: write shards with {TAR})")
    captions, about = captions_in(members.content.get("json", b"{}"))
    text = "json" if captions else "txt"
    if not captions:
        caption = members.content.get("txt", b"").decode()
        captions = [caption] if caption.strip() else []
    if not captions:
        raise ValueError(f"it has no caption beside it (links are not read: write shards with {TAR})")
    return Parts(members.image, text, captions, about)


def captions_in(content: bytes) -> tuple[list[str], dict]:
    """The captions of a json, none if it is no object or lists none, and the rest of it."""
    about: dict = {}
    with suppress(ValueError, TypeError):
        about = dict(json.loads(content))
    listed = about.pop("captions", None)
    captions = [c for c in listed if isinstance(c, str) and c.strip()] if isinstance(listed, list) else []
    return captions, about


def key_of(file: BinaryIO, offset: int) -> str:
    """The key of the member whose header begins there."""
    file.seek(offset)
    member = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace").next()
    split = member and _KEY_AND_EXTENSION.fullmatch(printable(member.name))
    return split[1] if split else f"the sample at byte {offset}"


def read_samples(
    file: BinaryIO,
    shard: str,
    lose: Callable[[str, object, int], None],
    *,
    images: bool,
    expected: int | None = None,
    usual: int = 0,
) -> Iterator[Members]:
    """The samples of a shard, complete or not.

    Args:
        file: read once from start to end; must be seekable without `images`.
        lose: called with name, reason and number of samples for what is missing.
        images: whether image contents are read, or only their places. Without them, an OSError is raised: it can be
            another one, or none, when the file is read again. With them it ends the shard, as damage does, unless it
            says what this process lacks.
        expected: how many samples the shard should have, where known.
        usual: how many similar shards have, where `expected` is unknown. With 0, `lose` gets 0 samples for a truncated
            shard.
    """
    damage = _Damage()
    found = incomplete = 0
    for sample in _grouped(_members(file, images, damage), shard):
        dotted = _dotted(sample)
        if dotted:
            found += len(dotted)
            lose(
                f"images of {sample.named}",
                f"the key of a sample ends at the first dot of its name, so {sample.key}.{dotted[0]} and the like are "
                f"no samples of their own: rename them, such as {sample.key}_{dotted[0]}",
                len(dotted),
            )
        if sample.image is not None or not dotted:
            found += 1
            incomplete += sample.image is None or not sample.place.keys() & set(TEXT_EXTENSIONS)
            yield sample
    reason = damage.end or next(iter(damage.parts), f"it holds {found} samples, {SIZES_FILE} beside it lists more")
    name = f"a part of {shard}" if found else shard
    if expected is not None and expected >= max(found, 1):
        if expected > found:
            lose(name, reason, expected - found)
    elif damage.end:
        lose(name, reason, max(1, usual - found) if usual else 0)
    elif len(damage.parts) > incomplete:  # a damaged header loses at least one member of a sample
        lose(name, reason, len(damage.parts) - incomplete)


def _dotted(sample: Members) -> list[str]:
    """Extensions of the images that would be samples of their own if their keys ended at the last dot: those with a
    text of the same name, or, if the sample has no image of its own, all."""
    names = [extension.rpartition(".") for extension in sample.place if "." in extension]
    texts = {name for name, _, kind in names if kind in TEXT_EXTENSIONS}
    return [
        f"{name}.{kind}"
        for name, _, kind in names
        if kind in IMAGE_EXTENSIONS and (sample.image is None or name in texts)
    ]


_Member = tuple[tarfile.TarInfo, bytes | None]
"""With its content, if that is read."""


def _grouped(members: Iterator[_Member], shard: str) -> Iterator[Members]:
    """Consecutive members with the same key, as samples. A special member is none, but makes a sample."""
    sample: Members | None = None
    for member, content in members:
        key, extension = _split(member.name)
        if sample is None or key != sample.key or extension in sample.place:
            if sample is not None:
                yield sample
            sample = Members(key, shard, member.offset)
        if _is_file(member):
            sample.place[extension] = member.offset_data, member.size
        if content is not None:
            sample.content[extension] = content
    if sample is not None:
        yield sample


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; the extension is "" if it belongs to no sample."""
    split = _KEY_AND_EXTENSION.fullmatch(name)
    return (split[1], split[2].lower()) if split else (name, "")


def _is_file(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


@dataclass
class _Damage:
    """Of a tar file: damaged parts with readable members after them, and what ended reading early."""

    parts: list[str] = field(default_factory=list)
    end: str = ""


def _members(file: BinaryIO, images: bool, damage: _Damage) -> Iterator[_Member]:
    """The files in a tar file that have a key and an extension.

    Damaged headers are skipped (`ignore_zeros`), so that members after them are not lost.
    """

    class Header(_Header):
        """Counts the blocks of this file."""

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
            tarinfo=Header,
            encoding="utf-8",
            errors="backslashreplace",
        )
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # the stub lacks the list that grows with the file
            member.name = printable(member.name)
            if Header.damaged or Header.zeros not in (0, _END_BLOCKS) and member.offset % tarfile.RECORDSIZE:
                damage.parts.append(f"{Header.damaged + Header.zeros} blocks before {member.name} are damaged")
            Header.damaged = Header.zeros = 0
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            extension = _split(member.name)[1]
            if not extension or member.isdir():
                continue
            wanted = extension in read and _is_file(member)
            yield member, tar.extractfile(member).read() if wanted else None  # type: ignore[union-attr]
            Header.members += 1
    except Exception as error:  # readers of URLs raise their own exceptions
        raise_lack(error)
        if isinstance(error, OSError) and not images:
            raise
        damage.end = f"it cannot be read to its end ({error or type(error).__name__})"
    else:
        if Header.damaged or Header.zeros > _END_BLOCKS + _RECORD_BLOCKS:
            damage.end = f"its last {Header.damaged + Header.zeros} blocks are damaged"
        elif not Header.zeros:
            damage.end = "it has no end-of-archive mark, so it was cut off"
    if not Header.members and Header.damaged:
        damage.end = f"it is not an uncompressed tar file, it begins with {Header.begins[:16]!r}"


class _Header(tarfile.TarInfo):
    """A header class that counts damaged headers, which tarfile skips silently. Each file has a subclass of its own."""

    begins = b""
    members = 0
    damaged = 0
    zeros = 0
    """Zero blocks since the last readable header."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        cls.begins = cls.begins or bytes(buf)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if buf == bytes(tarfile.BLOCKSIZE):
                cls.zeros += 1
            elif buf:  # not the end of the file
                cls.damaged += 1
            raise
