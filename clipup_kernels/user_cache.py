"""Files that this package keeps for later programs of the same user: the result of the self-check, measured tiles."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def user_cache(*parts: str) -> Path:
    """A path in ``clipup`` in the user's cache directory: ``$XDG_CACHE_HOME``, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clipup", *parts)


def write_json(path: Path, content: Any) -> None:
    """Writes a file so that readers find the old content or the new; raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine is in such a block for the file. Where files cannot be locked or
    written, nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield
