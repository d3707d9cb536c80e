"""Directories of images without captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from .. import checks
from ..extras import missing
from .images import decodes_heic
from .samples import Sample
from .tars import IMAGE_EXTENSIONS

_RAW = ("arw", "cr2", "cr3", "crw", "dng", "nef", "nrw", "orf", "pef", "raf", "raw", "rw2", "srw", "x3f")
_HEIC = ("heic", "heif")
READ = IMAGE_EXTENSIONS + _HEIC * decodes_heic()
"""Kinds of files that are read as images."""
_PASSED_OVER = {*_RAW, *_HEIC, "avif", "bmp", "gif", "jxl", "tif", "tiff"}.difference(READ)


def image_files(source: str | Path, argument: str = "images") -> list[Sample]:
    """The image files below a directory, by extension, in the order of their names; ``key`` is the path below it. What
    is hidden by a dot, and the thumbnails of a network drive, are left out. Links to files that are gone are included,
    so that they are counted as unreadable.

    Raises:
        FileNotFoundError: no such directory, or no image in it.
    """
    root = Path(source)
    checks.directory(source, "one with images", argument)
    named = [path for path in sorted(visible(root)) if path.suffix.lower()[1:] in READ]
    # not pipes: opening them would wait
    paths = [path for path in named if path.is_file() or (path.is_symlink() and not path.exists())]
    if not paths:
        others = passed_over(source) or "no image"
        raise FileNotFoundError(f"{argument}: {source} holds {others}; expected {', '.join(READ)}")
    return [Sample(key := path.relative_to(root).as_posix(), str(path), (), metadata={"key": key}) for path in paths]


def visible(root: Path, pattern: str = "**/*") -> Iterator[Path]:
    """What is below a directory, but for what is hidden by a dot and the thumbnails of a network drive."""
    for path in root.glob(pattern):
        if not any(part.startswith((".", "@eaDir")) for part in path.relative_to(root).parts):
            yield path


def passed_over(source: str | Path, read: Collection[str] = READ) -> str:
    """How many pictures of kinds that are not read, and which folders without permission to read, are below a
    directory, for a message; empty if none."""
    root, others = Path(source), _PASSED_OVER.difference(read)
    kinds = Counter(kind for path in visible(root) if (kind := path.suffix.lower()[1:]) in others)
    named = ", ".join(f"{'RAW ' * (kind in _RAW)}{kind} ({count})" for kind, count in sorted(kinds.items()))
    hint = f"; {missing('reading heic', 'pi_heif', 'heic')}" if kinds.keys() & {*_HEIC} else ""
    closed = [repr(str(path)) for path in (root, *visible(root)) if path.is_dir() and not os.access(path, os.R_OK)]
    pictures = [f"pictures of other kinds ({kinds.total()}): {named}{hint}"] * bool(kinds)
    return "; ".join(pictures + [f"folders without permission to read: {', '.join(closed)}"] * bool(closed))
