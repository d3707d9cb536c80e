"""Copies of a run's directory at another place, made in a thread. A copy that fails is reported, and tried again."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import fsspec

from ...locks import LOCK_FILE

_TEMPORARY = ".tmp"
"""In the names of files that are being written."""


class RemoteSync:
    """Copies a directory every few seconds, between ``start`` and ``close``.

    Files that are half-written have temporary names and are not copied; what was deleted here remains there.
    """

    def __init__(
        self,
        local: Path,
        remote: str,
        protocol: Literal["s3", "fsspec"],
        every: float,
        report: Callable[[str], object],
        log: logging.Logger,
    ) -> None:
        """
        Args:
            remote: the directory that ``local`` is copied to.
            every: seconds between two copies.
            report: takes the message about a copy that has failed.

        Raises:
            ValueError, ImportError: fsspec does not know the URL, or its package is not installed.
        """
        self.local, self.remote, self.every = local, remote.rstrip("/"), every
        self._report, self._log = report, log
        self._files: Any = None
        """fsspec's file system; None for aws."""
        if protocol == "fsspec":
            self._files, self._root = fsspec.url_to_fs(self.remote)
        self._copied: dict[Path, tuple[int, int]] = {}
        """Size and time of change of the files that fsspec has copied."""
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
        """Whether the copy has a directory of this name that is not empty.

        Raises:
            OSError: that could not be found out.
        """
        if self._files is not None:
            return bool(self._files.find(f"{self._root}/{name}"))
        return bool(_aws("ls", f"{self.remote}/{name}/", codes=(0, 1)))  # 1 where there is nothing

    def copy(self) -> bool:
        """Copies now, and returns whether that has succeeded."""
        try:
            if self._files is None:
                left_out = ("--exclude", f"*{_TEMPORARY}*", "--exclude", LOCK_FILE)
                _aws("sync", str(self.local), self.remote, "--only-show-errors", *left_out)
            else:
                self._copy_changed()
        except Exception as error:  # file systems of fsspec raise their own exceptions
            self._report(f"remote sync to {self.remote} failed: {error}; the files in {self.local} are whole")
            return False
        self._log.info("remote sync to %s done", self.remote)
        return True

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


def _aws(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """What ``aws s3`` prints."""
    done = subprocess.run(["aws", "s3", *arguments], capture_output=True, text=True)
    if done.returncode not in codes:
        raise OSError(" ".join(done.stderr.split()) or f"aws has ended with exit code {done.returncode}")
    return done.stdout.strip()
