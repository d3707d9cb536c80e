"""Files that appear whole and together, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_WRITING = ".writing"


_LONGEST_WRITE = 24 * 3600


_own: set[str] = set()
"""Temporary directories of this process's own writers."""


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files so that they appear whole and together, or not at all.

    Every writer gets a path to write to, in a temporary directory beside its own. Once all have written and the bytes
    are on the disk, the files are moved into place. When anything fails before that, what was there stays as it was.
    What a killed process left behind in such directories is removed.
    """
    name = f"{_WRITING}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    folders = {path.parent: path.parent / name for path in writers}
    written = {path: folders[path.parent] / path.name for path in writers}
    _own.add(name)
    try:
        for parent, folder in folders.items():
            remove_abandoned(parent)
            folder.mkdir()
        for path, write in writers.items():
            write(written[path])
            written[path].chmod(folders[path.parent].stat().st_mode & 0o666)  # safetensors makes its files private
            with open(written[path], "rb+") as file:
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        _own.discard(name)


def remove_abandoned(directory: Path, locked: bool = False) -> None:
    """Removes temporary directories in which processes were killed while they wrote into ``directory``.

    Args:
        locked: the caller's lock says that nothing else writes there. Otherwise those of this machine go whose process
            has ended, and those of other machines after a day.
    """
    for folder in directory.glob(f"{_WRITING}.*.tmp"):
        maker = re.fullmatch(rf"{re.escape(_WRITING)}\.(.+)\.(\d+)\.[0-9a-f]{{8}}\.tmp", folder.name)
        if maker is not None and folder.name not in _own and (locked or _abandoned(folder, maker[1], int(maker[2]))):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path, host: str, pid: int) -> bool:
    try:
        if host != socket.gethostname():
            return time.time() - folder.stat().st_mtime > _LONGEST_WRITE
        if pid != os.getpid():
            os.kill(pid, 0)  # sends nothing
            return False
    except (FileNotFoundError, PermissionError):  # it is gone by now, or is another user's process
        return False
    except ProcessLookupError:
        pass
    return True
