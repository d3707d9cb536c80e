"""Copies of a run's directory at another place, made in a thread. A copy that fails is reported, and tried again."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

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
            report: takes the message about a copy that has failed; a second failure in a row goes to the log only.

        Raises:
            ValueError, ImportError: fsspec does not know the URL, or its package is not installed.
        """
        self.local, self.remote, self.every = local, remote.rstrip("/"), every
        self._report, self._log = report, log
        self._remote: _Remote = _Aws(local, self.remote) if protocol == "s3" else _Fsspec(local, self.remote)
        self._failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="remote sync", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for a copy that is being made, and makes the last one."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.copy()

    def holds(self, name: str) -> bool:
        """Whether the copy has a directory of this name that is not empty.

        Raises:
            OSError: that could not be found out.
        """
        return self._remote.holds(name)

    def copy(self) -> bool:
        """Copies now, and returns whether that has succeeded."""
        try:
            self._remote.copy()
        except Exception as error:  # file systems of fsspec raise their own exceptions
            text = f"remote sync to {self.remote} failed: {error}; the files in {self.local} are whole"
            (self._log.warning if self._failed else self._report)(text)
            self._failed = True
            return False
        self._failed = False
        self._log.info("remote sync to %s done", self.remote)
        return True

    def _repeat(self) -> None:
        self.copy()
        while not self._end.wait(self.every):
            self.copy()


class _Remote(Protocol):
    """The other place."""

    def copy(self) -> None: ...

    def holds(self, name: str) -> bool:
        """Whether it has a directory of this name that is not empty."""


class _Aws:
    def __init__(self, local: Path, remote: str) -> None:
        self._local, self._remote = local, remote

    def copy(self) -> None:
        left_out = [part for name in (f"*{_TEMPORARY}*", LOCK_FILE) for part in ("--exclude", name)]
        done = self._run("sync", str(self._local), self._remote, "--only-show-errors", *left_out)
        if done.returncode:
            raise OSError(" ".join(done.stderr.split()) or f"aws has ended with exit code {done.returncode}")

    def holds(self, name: str) -> bool:
        done = self._run("ls", f"{self._remote}/{name}/")
        if done.returncode > 1:  # it ends with 1 where there is nothing
            raise OSError(" ".join(done.stderr.split()))
        return bool(done.stdout.strip())

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["aws", "s3", *arguments], capture_output=True, text=True)


class _Fsspec:
    """Copies the files that have changed since this object copied them."""

    def __init__(self, local: Path, remote: str) -> None:
        self._files, self._root = fsspec.url_to_fs(remote)
        self._local = local
        self._copied: dict[Path, tuple[int, int]] = {}

    def holds(self, name: str) -> bool:
        directory = f"{self._root}/{name}"
        return self._files.isdir(directory) and bool(self._files.ls(directory, detail=False))

    def copy(self) -> None:
        for path in sorted(self._local.rglob("*")):
            name = path.relative_to(self._local).as_posix()
            if not path.is_file() or path.name == LOCK_FILE or _TEMPORARY in name:
                continue
            about = path.stat()
            state = about.st_size, about.st_mtime_ns
            if self._copied.get(path) == state:
                continue
            target = f"{self._root}/{name}"
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)
            self._copied[path] = state
