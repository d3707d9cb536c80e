"""Copies of a run's directory at another place, made in a thread. A copy that fails is reported, and tried again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import fsspec

from ...locks import LOCK_FILE
from .records import LOG

_TEMPORARY = ".tmp"
"""In the names of files that are being written."""


class RemoteSync:
    """Copies a directory every few seconds, between ``start`` and ``close``.

    Files that are half-written have temporary names and are not copied; what was deleted here remains there.
    """

    def __init__(self, local: Path, remote: str, every: float, report: Callable[[str], object]) -> None:
        """
        Args:
            remote: the URL of the directory that ``local`` is copied to.
            every: seconds between two copies.
            report: takes the message about a copy that has failed.

        Raises:
            ValueError, ImportError: fsspec does not know the URL, or its package is not installed.
        """
        self.local, self.remote, self.every, self._report = local, remote, every, report
        self._files, self._root = fsspec.url_to_fs(remote)
        self._copied: dict[Path, tuple[int, int]] = {}
        """Size and time of change of the files that were copied."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="remote sync", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for a copy that is being made, and makes the last one."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self.copy()

    def holds(self, name: str) -> bool:
        """Whether the copy has a directory of this name that is not empty."""
        return bool(self._files.find(f"{self._root}/{name}"))

    def copy(self) -> None:
        """Copies now. A failure is reported."""
        try:
            self._copy_changed()
            LOG.info("remote sync to %s done", self.remote)
        except Exception as error:  # file systems of fsspec raise their own exceptions
            self._report(f"remote sync to {self.remote} failed: {error}; the files in {self.local} are whole")

    def _copy_changed(self) -> None:
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            if not path.is_file() or path.name == LOCK_FILE or _TEMPORARY in name:
                continue
            state = path.stat().st_size, path.stat().st_mtime_ns
            if self._copied.get(path) != state:
                target = f"{self._root}/{name}"
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
                self._copied[path] = state

    def _repeat(self) -> None:
        self.copy()
        while not self._end.wait(self.every):
            self.copy()
