"""Files that this package keeps for later programs of the same user: the result of the self-check, measured tiles."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def user_cache(*parts: str) -> Path:
    """A path in ``clipup`` in the user's cache directory: ``$XDG_CACHE_HOME``, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clipup", *parts)


def write_json(path: Path, content: Any) -> None:
    """Writes a file so that readers find the old content or the new one; raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
