"""Pickles that run code when they are loaded."""

from __future__ import annotations

from pathlib import Path


class MakesFile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
