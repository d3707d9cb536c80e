"""Who made the drawings of a data set, under which licence, and what the data depend on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from .iconify import IconSet


def of_sets(sets: Sequence[IconSet], used: Iterable[str]) -> list[dict]:
    """Makers and licences, for ``dataset.json``.

    Args:
        used: the set of every image.
    """
    images = Counter(used)
    return [
        {
            "set": described.prefix,
            "gives": described.name,
            "made_by": described.author,
            "licence": described.licence,
            "url": described.url,
            "images": images[described.prefix],
        }
        for described in sets
    ]


def licences(makers: Sequence[dict], source: dict[str, str]) -> str:
    """The text of LICENSES.md, from ``of_sets``."""
    rows = "\n".join(
        "| {set} | {gives} | {made_by} | {licence} | {images} | {url} |".format(**credit) for credit in makers
    )
    return f"""# Makers and licences of the icons

The drawings were scaled and put on white, and are otherwise unchanged. An icon's key names its set (`SET/NAME`). They
were taken from {source["package"]} {source["version"]}.

| set | name | made by | licence | images | from |
|---|---|---|---|---|---|
{rows}
"""


def fingerprint(*parts: object) -> str:
    """A digest of what a data set depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
