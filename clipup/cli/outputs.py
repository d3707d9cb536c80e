"""Checks of output paths before a command starts its work."""

from __future__ import annotations

import os
from pathlib import Path


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
    existing = next(one for one in (Path(path).absolute(), *Path(path).absolute().parents) if one.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{argument}: {existing} is a file; expected a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{argument}: no permission to write to {existing}; choose another directory")


def printable(text: str) -> str:
    """Text from a file or its name for a terminal: what is not printable is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in text
    )
