"""The error for a directory where shards or a CSV file are expected."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from .tars import IMAGE_EXTENSIONS, TAR


def not_a_source(argument: str, directory: str | os.PathLike, shards: str = "*.tar") -> ValueError:
    """The error, which suggests what to name in the directory, or how to make data of its files.

    Args:
        argument: the argument that got the directory. shards: the preferred shard pattern.
    """
    root = Path(directory)
    table = next((path for ending in ("csv", "tsv") for path in sorted(root.glob(f"*.{ending}"))), None)
    image = next((path for path in root.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS), None)
    if any(root.glob("*.tar")):
        pattern = shards if any(root.glob(shards)) else "*.tar"
        advice = f"name the shards of one split, such as {root / pattern}"
    elif table is not None:
        advice = f"name the file in it, {table}"
    elif image is not None and image.with_suffix(".txt").is_file():
        advice = (
            f"it holds images with captions beside them, which make a shard: {TAR} -cf data.tar "
            f"-C {shlex.quote(str(root))} . and name data.tar"
        )
    elif image is not None:
        advice = (
            f"it holds images, such as {image.name}, and no captions: write a CSV file with the columns filepath and "
            "title, separated by a tab, one image per line, and name that file"
        )
    else:
        advice = "it holds no shard (.tar), no CSV file and no image"
    return ValueError(f"{argument}: {root} is a directory: {advice}")
