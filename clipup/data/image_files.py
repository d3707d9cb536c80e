"""Directories of images without captions."""

from __future__ import annotations

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


def image_files(source: str | Path) -> list[Sample]:
    """The image files below a directory, by extension, in the order of their names; ``key`` is the path below it. What
    is hidden by a dot, and the thumbnails of a network drive, are left out.

    Raises:
        FileNotFoundError: no such directory, or no image in it.
    """
    root = Path(source)
    checks.directory(source, "one with images", "images")
    named = [path for path in sorted(visible(root)) if path.suffix.lower()[1:] in READ]
    paths = [path for path in named if path.is_file()]  # to open a pipe would be to wait
    if not paths:
        others = passed_over(source) or "no image"
        raise FileNotFoundError(f"images: {source} holds {others}; expected {', '.join(READ)}")
    keys = [path.relative_to(root).as_posix() for path in paths]
    return [Sample(key, str(path), (), metadata={"key": key}) for key, path in zip(keys, paths, strict=True)]


def visible(root: Path, pattern: str = "**/*") -> Iterator[Path]:
    """What is below a directory, but for what is hidden by a dot and the thumbnails of a network drive."""
    for path in root.glob(pattern):
        if not any(part.startswith((".", "@eaDir")) for part in path.relative_to(root).parts):
            yield path


def passed_over(source: str | Path, read: Collection[str] = READ) -> str:
    """How many pictures of kinds that are not read are below a directory, for a message; empty if none."""
    others = _PASSED_OVER.difference(read)
    kinds = Counter(kind for path in visible(Path(source)) if (kind := path.suffix.lower()[1:]) in others)
    named = ", ".join(f"{'RAW ' * (kind in _RAW)}{kind} ({count})" for kind, count in sorted(kinds.items()))
    hint = f"; {missing('reading heic', 'pi_heif', 'heic')}" if kinds.keys() & {*_HEIC} else ""
    return f"pictures of other kinds ({kinds.total()}): {named}{hint}" if kinds else ""
