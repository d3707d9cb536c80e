"""Atomic file writing: a group of files is replaced completely, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_PREFIX = ".writing"
_MAX_AGE = 24 * 3600
"""Seconds after which a temporary directory of another machine counts as abandoned."""
_FAILED_WRITE = r"^\[Errno|I/O error|inline_container|iostream error"
"""Of an OSError, in messages of safetensors, and of torch.save, whose errors have other types and name no file."""
_own: set[str] = set()
"""Names of the temporary directories that this process is writing to."""


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes several files atomically.

    Each writer is called with a path in a temporary directory next to its target. When all files are written and
    flushed to disk, they are moved into place. If anything fails before that, existing files are unchanged. Temporary
    directories left behind by killed processes are removed.

    Raises:
        IsADirectoryError: a target is a directory; nothing was changed.
        OSError: a file could not be written, as on a full disk.
    """
    for path in writers:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory, and should be a file; nothing was changed")
    name = _own_name()
    folders = {path.parent: path.parent / name for path in writers}
    written = {path: folders[path.parent] / path.name for path in writers}
    try:
        for parent, folder in folders.items():
            remove_abandoned(parent)
            folder.mkdir()
        for path, write in writers.items():
            try:
                write(written[path])
                written[path].chmod(folders[path.parent].stat().st_mode & 0o666)  # safetensors creates private files
                with open(written[path], "rb+") as file:
                    os.fsync(file.fileno())
            except Exception as error:
                if getattr(error, "filename", None) is not None or not re.search(_FAILED_WRITE, str(error)):
                    raise
                raise OSError(f"{path} could not be written ({error}); nothing was changed") from error
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        _own.discard(name)


def make_aside(parent: Path) -> Path:
    """A temporary directory in ``parent``, for files that are then moved into place together. ``remove_abandoned`` of a
    later process removes it if this one is killed; otherwise end its use with ``remove_aside``."""
    aside = parent / _own_name()
    aside.mkdir()
    return aside


def remove_aside(aside: Path) -> None:
    """Removes what is left of a directory from ``make_aside``; it may have been moved."""
    shutil.rmtree(aside, ignore_errors=True)
    _own.discard(aside.name)


def remove_directory(path: Path) -> None:
    """Removes a directory as if at once: a kill in between leaves nothing under its name."""
    aside = make_aside(path.parent)
    try:
        path.rename(aside / path.name)
    finally:
        remove_aside(aside)


def _own_name() -> str:
    """A new name of a temporary directory of this process."""
    name = f"{_PREFIX}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    _own.add(name)
    return name


def remove_abandoned(directory: Path, locked: bool = False) -> None:
    """Removes temporary directories that killed processes left in ``directory``.

    Args:
        locked: the caller holds a lock, so no other process is writing there and all are removed. Otherwise only those
            whose process on this machine has ended, and those of other machines after a day.
    """
    for folder in directory.glob(f"{_PREFIX}.*.tmp"):
        owner = re.fullmatch(rf"{re.escape(_PREFIX)}\.(.+)\.(\d+)\.[0-9a-f]{{8}}\.tmp", folder.name)
        if owner is not None and folder.name not in _own and (locked or _abandoned(folder, owner[1], int(owner[2]))):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path, host: str, pid: int) -> bool:
    try:
        if host != socket.gethostname():
            return time.time() - folder.stat().st_mtime > _MAX_AGE
        if pid != os.getpid():
            os.kill(pid, 0)  # only checks that the process exists
            return False
    except (FileNotFoundError, PermissionError):  # already removed, or a process of another user
        return False
    except ProcessLookupError:
        pass
    return True
