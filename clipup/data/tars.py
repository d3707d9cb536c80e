"""Reading the samples of WebDataset shards; every loss in a damaged file is reported.

A sample consists of consecutive members of a tar file with the same key: `KEY.png`, `KEY.txt`. Links, sparse files and
other special members are ignored, and nothing is extracted to disk.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from .shard_writer import SIZES_FILE

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Image extensions; if a sample has several images, the first in this order is used, as in open_clip."""
TEXT_EXTENSIONS = ("txt", "json", "cls")

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as WebDataset splits names
_MARK = 2  # zero blocks that end an archive; more of them pad the last record of 20 blocks
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class TarSample:
    """Members by extension: their content, where it was read, and their place (offset, size) in the file."""

    key: str
    shard: str
    content: dict[str, bytes] = field(default_factory=dict)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The extension of its image."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.place), None)

    @property
    def named(self) -> str:
        return f"{self.key} in {self.shard}"


def lines(text: str) -> list[str]:
    """The captions of a text with one per line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


class Complete(NamedTuple):
    """What a complete sample consists of."""

    image: str
    """The extension of its image."""
    text: str
    """The extension of the member with its captions."""
    captions: list[str]
    about: dict
    """The rest of its json."""


def complete(sample: TarSample) -> Complete:
    """The parts of a sample. Captions are `captions` of its json, else the lines of its txt.

    Raises ValueError with the reason when it has no caption or no image.
    """
    about: dict = {}
    try:
        about = dict(json.loads(sample.content.get("json", b"{}")))
    except (ValueError, TypeError, RecursionError):
        pass  # not a JSON object: use the txt
    listed = about.pop("captions", None)
    listed = listed if isinstance(listed, list) else []
    captions = [" ".join(c.splitlines()) for c in listed if isinstance(c, str) and c.strip()]
    text = "json" if captions else "txt"
    if not captions:
        try:
            captions = lines(sample.content.get("txt", b"").decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"its .txt is not UTF-8 ({error})") from error
    if sample.image is None:
        raise ValueError("it has no image beside it")
    if not captions:
        raise ValueError("it has no caption beside it")
    return Complete(sample.image, text, captions, about)


def key_of(member: str) -> str:
    """The key of the sample that a member belongs to."""
    split = _KEY_AND_EXTENSION.fullmatch(member)
    return split[1] if split else member


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
        images: whether image contents are read, or only their places.
        expected: how many samples the shard should have, where known.
        usual: how many similar shards have, where `expected` is unknown. With 0, `skip` gets 0 samples for a truncated
            shard.
    """
    faults = _Faults()
    found = incomplete = 0
    sample: TarSample | None = None
    for name, content, place in _members(file, images, faults):
        split = _KEY_AND_EXTENSION.fullmatch(name)
        if split is None:
            continue
        key, extension = split[1], split[2].lower()
        if sample is None or key != sample.key or extension in sample.place:
            if sample is not None:
                found, incomplete = found + 1, incomplete + _is_incomplete(sample)
                yield sample
            sample = TarSample(key, shard)
        sample.place[extension] = place
        if content is not None:
            sample.content[extension] = content
    if sample is not None:
        found, incomplete = found + 1, incomplete + _is_incomplete(sample)
        yield sample
    lost, reason = faults.lost(found, incomplete, expected, usual)
    if lost is not None:
        skip(f"a part of {shard}" if found else shard, reason, lost)


@dataclass
class _Faults:
    """Faults of a tar file: damaged parts with readable members after them, and what ended reading early."""

    damaged: list[str] = field(default_factory=list)
    end: str = ""

    def lost(self, found: int, incomplete: int, expected: int | None, usual: int) -> tuple[int | None, str]:
        """How many samples were lost besides the incomplete ones (None: nothing), and why."""
        reason = self.end or next(iter(self.damaged), "")
        if expected is not None:
            missing = expected - found if expected > found else None
            return missing, reason or f"it holds {found} samples, {SIZES_FILE} beside it says {expected}"
        if self.end:
            return max(1, usual - found) if usual else 0, reason
        beside = len(self.damaged) - incomplete  # a damaged header loses at least one member of a sample
        return beside if beside > 0 else None, reason


def _is_incomplete(sample: TarSample) -> bool:
    return sample.image is None or not sample.place.keys() & set(TEXT_EXTENSIONS)


def _members(file: BinaryIO, images: bool, faults: _Faults) -> Iterator[tuple[str, bytes | None, tuple[int, int]]]:
    """Name, content (of images and texts) and place of every regular file in a tar file.

    Damaged headers are skipped (`ignore_zeros`), so that members after them are not lost.
    """
    header = _watched_header()
    members = 0
    read = (*TEXT_EXTENSIONS, *(IMAGE_EXTENSIONS if images else ()))
    try:
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
            if header.damaged or not _is_padding(header.zeros, member.offset):
                faults.damaged.append(f"{header.lost_bytes()} bytes before {member.name} are damaged")
            header.damaged = header.zeros = 0
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name} is negative")
            if member.isreg() and not member.issparse():
                wanted = member.name.rpartition(".")[2].lower() in read
                content = tar.extractfile(member).read() if wanted else None
                yield member.name, content, (member.offset_data, member.size)
    except Exception as error:  # readers of URLs raise their own exceptions
        faults.end = f"{'its rest' if members else 'it'} cannot be read ({error})"
        if not members and header.damaged:
            faults.end = _kind_of(header.begins)
        return
    if not members and header.damaged:
        faults.end = _kind_of(header.begins)
    elif header.damaged or header.zeros > _MARK + tarfile.RECORDSIZE // tarfile.BLOCKSIZE:
        faults.end = f"its last {header.lost_bytes()} bytes are damaged"
    elif not header.zeros:
        faults.end = "it has no end-of-archive mark, so it was cut off"


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
            return super().frombuf(buf, encoding, errors)
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
