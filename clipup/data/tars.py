"""Reading the samples of WebDataset shards; what a damaged file lost is reported.

A sample consists of consecutive members of a tar file with the same key: `KEY.png`, `KEY.txt`. A key ends at the first
dot of the base name. Links, sparse files and other special members are not read, and nothing is extracted to disk.
"""

from __future__ import annotations

import json
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
_MOST_ZEROS = 1 + tarfile.RECORDSIZE // tarfile.BLOCKSIZE
"""Zero blocks at the end of an archive: two, and others that pad its last record."""


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


class Parts(NamedTuple):
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
        """Whether its captions are a txt of several lines."""
        return self.text == "txt" and len(lines(self.captions[0])) > 1


def lines(text: str) -> list[str]:
    """The captions of a text with one per line. Only \\n and \\r\\n end a line: a caption may hold what else
    ``str.splitlines`` splits at."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def complete(members: Members) -> Parts:
    """The parts of a sample. Captions are `captions` of its json, else one: its txt, as in open_clip.

    Raises ValueError with the reason when it has no caption or no image.
    """
    captions, about = captions_in(members.content.get("json", b"{}"))
    text = "json" if captions else "txt"
    captions = captions or [caption_of(members.content.get("txt", b""))]
    missing = "image" if members.image is None else "" if captions[0].strip() else "caption"
    if members.image is None or missing:
        raise ValueError(f"it has no {missing} beside it (links are not read: write shards with {TAR})")
    return Parts(members.image, text, captions, about)


def caption_of(content: bytes) -> str:
    """The caption in a txt."""
    return content.decode("utf-8-sig")


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
    return _split(member.name)[0] if member else f"the sample at byte {offset}"


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
        usual: how many similar shards have, where `expected` is unknown. With 0, `lose` gets 0 samples for a shard that
            was not read to its end.
    """
    damage = _Damage()
    found = incomplete = 0
    for sample in _samples(file, shard, images, damage):
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
    reason = damage.end or damage.within or f"it holds {found} samples, {SIZES_FILE} beside it lists more"
    name = f"a part of {shard}" if found else shard
    if expected is not None and expected >= max(found, 1):
        if expected > found:
            lose(name, reason, expected - found)
    elif damage.end:
        lose(name, reason, max(1, usual - found) if usual else 0)
    elif damage.within and not incomplete:  # what is damaged belonged to a sample
        lose(name, reason, 1)


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


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; the extension is "" if it belongs to no sample."""
    split = _KEY_AND_EXTENSION.fullmatch(printable(name))
    return (split[1], split[2].lower()) if split else (name, "")


@dataclass
class _Damage:
    """Of a tar file: what was skipped with readable members after it, and what ended reading early."""

    within: str = ""
    end: str = ""


def _samples(file: BinaryIO, shard: str, images: bool, damage: _Damage) -> Iterator[Members]:
    """Consecutive members with the same key, as samples. A special member has no content, but makes a sample.

    Damaged headers are skipped (`ignore_zeros`), so that members after them are not lost. What was cut off belongs to
    the last sample, which is not returned then.
    """

    class Header(_Header):
        """Counts the blocks of this file."""

    read = (*TEXT_EXTENSIONS, *(IMAGE_EXTENSIONS if images else ()))
    sample: Members | None = None
    try:
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
            if Header.damaged or Header.zeros not in (0, 2) and member.offset % tarfile.RECORDSIZE:
                damage.within = f"{Header.damaged + Header.zeros} blocks before {printable(member.name)} are damaged"
            Header.damaged = Header.zeros = 0
            key, extension = _split(member.name)
            if not extension or member.isdir():
                continue
            if sample is None or key != sample.key or extension in sample.place:
                if sample is not None:
                    yield sample
                sample = Members(key, shard, member.offset)
            if member.isreg() and not member.issparse():
                if extension in read:
                    sample.content[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
                sample.place[extension] = member.offset_data, member.size
    except Exception as error:  # readers of URLs raise their own exceptions
        raise_lack(error)
        if isinstance(error, OSError) and not images:
            raise
        damage.end = f"it cannot be read to its end ({error or type(error).__name__})"
    else:
        if Header.damaged or Header.zeros > _MOST_ZEROS:
            damage.end = f"its last {Header.damaged + Header.zeros} blocks are damaged"
        elif not Header.zeros:
            damage.end = "it has no end-of-archive mark, so it was cut off"
        if sample is not None:
            yield sample
    if sample is None and Header.damaged:
        damage.end = "it is not an uncompressed tar file"


class _Header(tarfile.TarInfo):
    """A header class that counts damaged headers, which tarfile skips silently. Each file has a subclass of its own."""

    damaged = 0
    zeros = 0
    """Zero blocks since the last readable header."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if buf:  # not the end of the file
                cls.damaged += any(buf)
                cls.zeros += not any(buf)
            raise
