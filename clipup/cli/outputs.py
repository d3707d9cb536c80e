"""Checks of the paths that a command will write to, before it works for them."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(argument: str, path: str | Path) -> None:
    """
    Raises:
        OSError: no file of this path can be written, by what is on the disk now.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a directory; expected the path of a file")
    check_directory(argument, Path(path).parent)


def check_directory(argument: str, path: str | Path) -> None:
    """
    Raises:
        OSError: nothing can be written into a directory of this path, by what is on the disk now.
    """
    there = next(one for one in (Path(path).absolute(), *Path(path).absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{argument}: {there} is a file; expected a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{argument}: nothing can be written into {there}; choose another place")
