"""Writing a data set: byte-reproducible WebDataset shards, in a directory that is replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path

from ..atomic_files import make_aside, remove_abandoned, remove_aside
from ..locks import exclusive

DATASET_FILE = "dataset.json"
SIZES_FILE = "sizes.json"
LICENCES_FILE = "LICENSES.md"

Sample = tuple[str, dict[str, bytes]]
"""A key and its members by extension: `("twemoji-1f602", {"png": ..., "txt": ...})`."""


def write_shards(directory: Path, split: str, samples: Iterable[Sample], samples_per_shard: int) -> list[dict]:
    """Writes `<split>-000000.tar` etc. with `samples_per_shard` samples each (fewer in the last), one shard in memory.

    Returns for each shard its file name, number of samples and bytes, and sha256.
    """
    shards: list[dict] = []
    rest = iter(samples)
    while part := list(islice(rest, samples_per_shard)):
        path = directory / f"{split}-{len(shards):06d}.tar"
        _write_tar(path, part)
        shards.append({"file": path.name, "samples": len(part), "bytes": path.stat().st_size, "sha256": sha256(path)})
    return shards


def write_sizes(directory: Path, shards: Sequence[dict]) -> None:
    """Writes `sizes.json` in open_clip's format: number of samples by the shard's file name."""
    write_json(directory / SIZES_FILE, {shard["file"]: shard["samples"] for shard in shards})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time stay 0, for reproducibility
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def finished(directory: Path, fingerprint: str) -> bool:
    """Whether `directory` holds the data set with this fingerprint, complete and undamaged."""
    try:
        dataset = json.loads((directory / DATASET_FILE).read_text("utf-8"))
        shards = _shards(directory)
        return (
            dataset["fingerprint"] == fingerprint
            and bool(shards)
            and all(sha256(directory / name) == checksum for name, checksum in shards.items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_target(directory: Path, overwrite: bool, also: Iterable[str] = ()) -> None:
    """Raises ValueError, with how to continue, when building into `directory` would lose its content.

    Args:
        overwrite: whether a data set may be replaced.
        also: names of other files and directories of such data sets.
    """
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    others = names - {DATASET_FILE, SIZES_FILE, LICENCES_FILE, *also, *_shards(directory)}
    if not names or overwrite and DATASET_FILE in names and not others:
        return
    fault, advice = "is not a data set", ""
    if DATASET_FILE in names and others:
        fault, advice = f"holds {', '.join(sorted(others)[:3])} beside a data set", ", or move that away"
    elif DATASET_FILE in names:
        fault = "contains another data set (other options or package versions)"
        advice = ", or replace it with --overwrite"
    raise ValueError(f"OUT: {directory} {fault}, nothing was changed: name another directory{advice}")


def _shards(directory: Path) -> dict[str, str]:
    """The checksums of the shards that a data set lists, by their names; none if its description cannot be read."""
    try:
        splits = json.loads((directory / DATASET_FILE).read_text("utf-8"))["splits"]
        return {os.path.basename(of["file"]): of["sha256"] for split in splits.values() for of in split["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sha256(path: str | os.PathLike) -> str:
    """The hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Locks `directory` against other processes that build a data set, and cleans up after killed processes.

    Raises DirectoryInUse when another process holds the lock.
    """
    directory = directory.resolve()
    lock = directory.parent / f".{directory.name}.lock"
    with exclusive(lock, directory, "wait for it to end, or name another directory"):
        remove_abandoned(directory.parent)
        yield


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A directory to build in; it replaces `directory` when the block succeeds and is removed when it fails."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = make_aside(directory.parent)
    building = aside / directory.name
    building.mkdir()
    try:
        yield building
        replaced = aside / "replaced"
        if directory.exists():
            directory.rename(replaced)
        try:
            building.rename(directory)
        except BaseException:
            if replaced.exists():
                replaced.rename(directory)
            raise
    finally:
        remove_aside(aside)
