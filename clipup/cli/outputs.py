"""Where a command writes: checked before it starts its work, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import remove_abandoned, replace_files
from ..locks import LOCK_FILE, exclusive


def check_file(argument: str, path: str | Path) -> None:
    """
    Raises:
        OSError: a file cannot be written at this path.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected the path of a file")
    check_directory(argument, Path(path).parent)


def check_directory(argument: str, path: str | Path) -> None:
    """
    Raises:
        OSError: a directory at this path cannot be created or written to.
    """
    existing = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{argument}: {existing} is a file; expected a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{argument}: no permission to write to {existing}; choose another directory")


@contextmanager
def empty_directory(path: Path) -> Iterator[None]:
    """Holds the lock of a directory that is empty, or is created; an empty directory is removed again.

    Raises:
        OSError: it cannot be written to, is not empty, or another process writes to it.
    """
    check_directory("out", path)
    with exclusive(path / LOCK_FILE, path, "wait for it to end, or choose another directory"):
        remove_abandoned(path, locked=True)
        if {file.name for file in path.iterdir()} - {LOCK_FILE}:
            raise FileExistsError(f"{path} is not empty; choose another directory")
        yield


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: lambda file: file.write_text(text, encoding="utf-8")})
