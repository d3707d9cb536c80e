"""A small disk that can be filled: a tmpfs of a few megabytes, mounted where that is allowed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

SIZE = 64 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


class SmallDisk:
    """``fill`` leaves a number of free bytes, ``empty`` frees all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def mount(self) -> None:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(self.path)]
        subprocess.run(command, check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True, capture_output=True)

    def fill(self, room: int) -> None:
        with open(self._ballast, "wb") as file:
            free = os.statvfs(self.path).f_bavail * _PAGE
            with contextlib.suppress(OSError):  # the run writes too
                os.posix_fallocate(file.fileno(), 0, max(free - room, 1))

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


def reason_against_mounting(where: Path) -> str | None:
    """Why no disk can be mounted there; None if it can."""
    disk = SmallDisk(where)
    try:
        disk.mount()
        disk.unmount()
    except FileNotFoundError:
        return "the program mount is missing"
    except subprocess.CalledProcessError as error:
        return error.stderr.decode(errors="replace").strip() or "mount fails"
    finally:
        where.rmdir()
    return None
