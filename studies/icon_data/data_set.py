"""The directory of a data set of drawings: written once, with their makers and licences."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from clipup.data import shard_writer
from clipup.data.loaders import describe

from . import iconify
from .iconify import IconSet

_LICENCES = """# Makers and licences of the icons

The drawings were scaled and put on white, and are otherwise unchanged. An icon's key names its set (`SET/NAME`). They
were taken from {package} {version}.

| set | name | made by | licence | images | from |
|---|---|---|---|---|---|
"""
_LICENCE = "| {set} | {gives} | {made_by} | {licence} | {images} | {url} |\n"


class Made(NamedTuple):
    """The result of a data set's builder."""

    content: dict
    """For ``dataset.json``."""
    sets: list[IconSet]
    used: Iterable[str]
    """The set of every drawing."""


def build(
    out: str | Path,
    package: str | Path,
    name: str,
    rule: int,
    options: dict,
    sets: tuple[tuple[str, ...], ...],
    overwrite: bool,
    make: Callable[[Path], Made],
) -> dict:
    """Builds a data set in ``out`` unless it is there, and returns the content of its ``dataset.json``.

    Args:
        rule: incremented when the same package and options give a different data set.
        options: all that the data depend on besides the package and its ``sets``.
        make: writes the shards into a directory that is put in the place of ``out``.

    Raises:
        FileNotFoundError: the package is missing.
        ImportError: resvg-py is not installed.
        ValueError: ``out`` holds something else, which is left unchanged.
    """
    out = Path(out)
    source = {
        "package": iconify.PACKAGE,
        "version": iconify.version(Path(package)),
        "resvg_py": iconify.renderer_version(),
    }
    fingerprint = hashlib.sha256(json.dumps([rule, source, options, *sets]).encode()).hexdigest()
    with shard_writer.only_writer(out):
        if shard_writer.finished(out, fingerprint):
            return describe(out)
        shard_writer.check_target(out, overwrite)
        with shard_writer.appearing_whole(out) as directory:
            made = make(directory)
            shards = [shard for split in made.content["splits"].values() for shard in split["shards"]]
            shard_writer.write_sizes(directory, [shard for shard in shards if shard["samples"]])
            images = Counter(made.used)
            makers = [{**asdict(of), "images": images[of.set]} for of in made.sets if images[of.set]]
            rows = "".join(_LICENCE.format(**maker) for maker in makers)
            (directory / "LICENSES.md").write_text(_LICENCES.format(**source) + rows, "utf-8")
            about = {"name": name, "format": rule, "fingerprint": fingerprint, "options": options}
            dataset = {**about, **made.content, "source": source, "sources": makers}
            shard_writer.write_json(directory / shard_writer.DATASET_FILE, dataset)
    return dataset
