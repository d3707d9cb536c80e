"""Reading the samples of WebDataset shards. Samples that a damaged file lost are reported.

A sample consists of consecutive members of a tar file with the same key: `KEY.png`, `KEY.txt`. A key ends at the first
dot of the base name. Links, sparse files and other special members are not read, and nothing is extracted to disk.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from typing_extensions import Self

from ..progress import printable
from .shard_writer import SIZES_FILE
from .skips import raise_lack

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Image extensions; if a sample has several images, the first in this order is used, as in open_clip."""
CAPTION_EXTENSIONS = ("txt", "caption", "text")
"""Extensions of members that hold one caption; the first in this order is used."""
TEXT_EXTENSIONS = (*CAPTION_EXTENSIONS, "json", "cls")
_DOTTED_IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
TAR = "tar --sort=name --dereference --hard-dereference"
"""The command that writes the files of a directory as samples: side by side, and with content instead of links."""

_EXPECTED = {
    "image": ", ".join(IMAGE_EXTENSIONS),
    "caption": f"{', '.join(CAPTION_EXTENSIONS)}, or `captions` or `caption` in json",
}
_NO_TAR = "it is not an uncompressed tar file"
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as WebDataset splits names


@dataclass
class Members:
    """The members of one sample by extension: their content, if it was read, and their place (offset, size)."""

    key: str
    shard: str
    offset: int
    """Where the header of the first member begins."""
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
    """The parts of a complete sample."""

    image: str
    """The extension of its image."""
    text: str
    """The extension of the member with its captions."""
    captions: list[str]
    about: dict
    """The rest of its json."""


def lines(text: str) -> list[str]:
    """The captions of a text with one per line. Only \\n and \\r\\n end a line: a caption may hold what else
    ``str.splitlines`` splits at."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def complete(members: Members) -> Parts:
    """The parts of a sample. Captions are `captions` of its json, else one: its txt, as in open_clip, another text, or
    `caption` of its json, as img2dataset writes it.

    Raises ValueError with the reason when it has no caption or no image.
    """
    text, broken = "json", ""
    try:
        captions, about = captions_in(members.content.get("json", b"{}"))
    except (TypeError, ValueError):
        captions, about, broken = [], {}, "its json is broken (not a JSON object), and "
    if not captions:
        text = next((name for name in CAPTION_EXTENSIONS if members.content.get(name, b"").strip()), text)
        alone = about.pop("caption", "") if text == "json" else caption_of(members.content[text])
        captions = [alone] if isinstance(alone, str) and alone.strip() else []
    if members.image is None or not captions:
        missing = "caption" if members.image else "image"
        raise ValueError(
            f"{broken}it has no {missing} beside it ({_EXPECTED[missing]}), only "
            f"{', '.join(members.place) or 'links'}; files of one sample have one name up to "
            f"the first dot, and links are not read (write shards with {TAR})"
        )
    return Parts(members.image, text, captions, about)


def caption_of(content: bytes) -> str:
    """The caption in a text member."""
    return content.decode("utf-8-sig")


def captions_in(content: bytes) -> tuple[list[str], dict]:
    """The list of captions in a json, empty if there is none, and the rest of the json.

    Raises TypeError or ValueError for what is not a JSON object.
    """
    about: dict = dict(json.loads(content))
    listed = about.pop("captions", None)
    captions = [c for c in listed if isinstance(c, str) and c.strip()] if isinstance(listed, list) else []
    return captions, about


def key_of(file: BinaryIO, offset: int) -> str:
    """The key of the member whose header begins there."""
    file.seek(offset)
    tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")
    return _split(next(iter(tar)).name)[0]


def read_samples(
    file: BinaryIO,
    shard: str,
    lose: Callable[[str, str, int], None],
    *,
    images: bool,
    expected: int | None = None,
    usual: int = 0,
) -> Iterator[Members]:
    """The samples of a shard, complete or not.

    Args:
        file: read once from start to end; must be seekable without `images`.
        lose: called with name, reason and number for lost samples.
        images: whether image contents are read, or only their places. Without them, an OSError is raised: reading the
            file again may succeed. With them it ends the shard, as damage does, unless this process lacks memory or
            file descriptors.
        expected: how many samples the shard should have, where known.
        usual: how many samples similar shards have, for an unknown `expected`. With 0, `lose` gets 0 samples for a
            shard that was not read to its end.
    """
    damage: list[str] = []
    count = 0
    for sample in _samples(file, shard, images, damage):
        dotted = [] if sample.image else [name for name in sample.place if name.endswith(_DOTTED_IMAGES)]
        count += len(dotted) or 1
        if dotted:
            lose(
                f"images of {sample.named}",
                f"the key of a sample ends at the first dot of its name, so {sample.key}.{dotted[0]} and the like are "
                f"no samples of their own: rename them, such as {sample.key}_{dotted[0]}",
                len(dotted),
            )
        else:
            yield sample
    name = f"a part of {shard}" if count else shard
    if expected is not None and expected >= max(count, 1):
        if expected > count:
            reason = f"it holds {count} samples, {SIZES_FILE} beside it lists more"
            lose(name, next(iter(damage), reason), expected - count)
    elif damage:
        lose(name, damage[0], max(1, usual - count) if usual else 0)


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; the extension is "" if it belongs to no sample."""
    split = _KEY_AND_EXTENSION.fullmatch(printable(name))
    return (split[1], split[2].lower()) if split else (name, "")


def _samples(file: BinaryIO, shard: str, images: bool, damage: list[str]) -> Iterator[Members]:
    """Consecutive members with the same key, as samples. A special member has no content, but makes a sample.

    The reason for an early end is appended to `damage`. The sample that it cuts off is not returned.
    """

    class Header(_Header):
        """Of this file."""

    read = (*TEXT_EXTENSIONS, *(IMAGE_EXTENSIONS if images else ()))
    sample: Members | None = None
    try:
        tar = tarfile.open(
            fileobj=file,
            mode="r|" if images else "r:",
            tarinfo=Header,
            encoding="utf-8",
            errors="backslashreplace",
        )
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # the stub lacks the list that grows with the file
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
        if any(Header.last):
            damage.append(f"what follows {sample.key} is damaged" if sample else _NO_TAR)
        elif len(Header.last) < tarfile.BLOCKSIZE:
            damage.append("it has no end-of-archive mark, so it was cut off")
        elif len(file.read(2 * tarfile.RECORDSIZE)) > tarfile.RECORDSIZE:  # more than what pads the last record
            damage.append("its end-of-archive mark is not at its end, so what follows is damaged or another archive")
    except Exception as error:  # readers of URLs raise their own exceptions
        raise_lack(error)
        if isinstance(error, OSError) and not images:
            raise
        not_begun = sample is None and any(Header.last)
        damage.append(_NO_TAR if not_begun else f"it cannot be read to its end ({error or type(error).__name__})")
        return
    if sample is not None:
        yield sample


class _Header(tarfile.TarInfo):
    """Keeps the last block that was read as a header. At a damaged one tarfile ends without an error, as at the end
    mark, which is zero. Each file has its own subclass."""

    last: bytes | bytearray = b""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        cls.last = buf
        return super().frombuf(buf, encoding, errors)
