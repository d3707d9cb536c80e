"""Writing a data set: WebDataset shards that come out the same to the byte, in a directory that appears whole or not
at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from ..locks import exclusive

DATASET_FILE = "dataset.json"
SIZES_FILE = "sizes.json"

Sample = tuple[str, dict[str, bytes]]
"""A key and its members by extension: `("twemoji-1f602", {"png": ..., "txt": ...})`."""


def write_shards(directory: Path, split: str, samples: Sequence[Sample], samples_per_shard: int) -> list[dict]:
    """Writes `<split>-000000.tar` and on, `samples_per_shard` samples each (the last holds the rest).

    Returns, a shard: its file name, how many samples and bytes it has, and the sha256 of the file.
    """
    shards = []
    for start in range(0, len(samples), samples_per_shard):
        part = samples[start : start + samples_per_shard]
        path = directory / f"{split}-{len(shards):06d}.tar"
        _write_tar(path, part)
        content = path.read_bytes()
        shards.append({
            "file": path.name,
            "samples": len(part),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        })  # fmt: skip
    return shards


def write_sizes(directory: Path, shards: Sequence[dict]) -> None:
    """`sizes.json` as open_clip reads it: samples by the shard's file name."""
    write_json(directory / SIZES_FILE, {shard["file"]: shard["samples"] for shard in shards})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time stay 0: nothing of this machine
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def finished(directory: Path, fingerprint: str) -> bool:
    """Whether `directory` holds, complete and undamaged, the data set that `fingerprint` stands for."""
    try:
        dataset = json.loads((directory / DATASET_FILE).read_text("utf-8"))
        if dataset["fingerprint"] != fingerprint:
            return False
        shards = [shard for split in dataset["splits"].values() for shard in split["shards"]]
        return all(sha256(directory / os.path.basename(shard["file"])) == shard["sha256"] for shard in shards)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuses to build into a directory whose content would be lost; ValueError says what can be done."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ValueError(f"OUT: {directory} is a file, expected a directory: name another one")
    if not any(directory.iterdir()):
        return
    if not (directory / DATASET_FILE).is_file():
        raise ValueError(
            f"OUT: {directory} holds files that are no data set, nothing was touched: name another directory"
        )
    if not overwrite:
        raise ValueError(
            f"OUT: {directory} holds another data set (other options or package versions), nothing was touched: "
            "name another directory, or replace it with --overwrite"
        )


def sha256(path: str | os.PathLike) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """While it is entered, no other process builds a data set in `directory`; what killed ones left is removed.

    A data set that was killed while a new one took its place is put back.

    Raises DirectoryInUse when another process does.
    """
    directory = directory.resolve()
    lock = directory.parent / f".{directory.name}.lock"
    with exclusive(lock, directory, "wait for it to end, or name another directory"):
        building, replaced = _left_behind(directory)
        if not os.path.lexists(directory):
            for old in [path for path in replaced if any(path.iterdir())][:1]:
                old.rename(directory)
        for path in (*building, *replaced):
            shutil.rmtree(path, ignore_errors=True)
        yield


def left_behind(directory: Path) -> bool:
    """Whether killed processes left something beside `directory`."""
    return any(_left_behind(directory.resolve()))


def _left_behind(directory: Path) -> tuple[list[Path], list[Path]]:
    """Data sets in the making, and replaced ones."""
    beside, name = directory.parent, glob.escape(directory.name)
    return tuple(sorted(beside.glob(f".{name}.{kind}-*")) for kind in ("building", "old"))


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A directory to build in; takes the place of `directory` when the block ends well, vanishes when it does not."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.building-", dir=directory.parent))
    try:
        yield building
        building.chmod(0o777 & ~_umask())
        _put_in_place(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _put_in_place(building: Path, directory: Path) -> None:
    if not directory.exists():
        building.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
    try:
        directory.rename(old)  # onto an empty directory, which the rename replaces
        try:
            building.rename(directory)
        except BaseException:
            old.rename(directory)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
