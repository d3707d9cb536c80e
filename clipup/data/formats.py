"""The formats of image-text data: by which names they are known. How each is read: ``loaders``."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..option_group import OptionGroup, all_idle
from .csv_files import CsvOptions


class Format(NamedTuple):
    """How a format is recognised."""

    noun: str
    """Names its data in messages."""
    endings: tuple[str, ...]
    """Of the names of its data."""
    options: type[OptionGroup]
    """The options that only this format has; a base class of ``SourceOptions``."""
    cut_short: bool = False
    """Whether more may follow the ending, as in a URL."""


FORMATS = {
    "csv": Format("a CSV file", (".csv", ".tsv"), CsvOptions),
    "webdataset": Format("shards", (".tar",), OptionGroup, cut_short=True),
}
"""By the names that ``dataset_type`` gives them."""


def name_of_format(source: str | None, dataset_type: str = "auto") -> str | None:
    """The name of a source's format; None without a source, or if its name does not tell.

    Args:
        dataset_type: a format, or "auto" for the format that the source's ending tells.
    """
    if source is None or dataset_type != "auto":
        return None if source is None else dataset_type
    name = os.path.basename(source)
    matching = (
        key
        for key, each in FORMATS.items()
        if name.endswith(each.endings) or each.cut_short and any(ending in name for ending in each.endings)
    )
    return next(matching, None)


def idle_options(*formats: str | None) -> dict[str, str]:
    """The options of other formats than these, which have no effect, with the reason."""
    others = [each for name, each in FORMATS.items() if name not in formats]
    return {name: why for each in others for name, why in all_idle(each.options, f"without {each.noun}").items()}
