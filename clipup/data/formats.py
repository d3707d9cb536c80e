"""The formats of image-text data, in one table."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..option_group import OptionGroup, all_idle
from .csv_files import CsvOptions, CsvSource, csv_samples
from .samples import Sample, Source
from .skips import Skips

if TYPE_CHECKING:
    from .options import DataOptions, SourceOptions
    from .train_data import Reader


class Format(NamedTuple):
    """How a format is recognised and read."""

    noun: str
    """Names its data in messages."""
    endings: tuple[str, ...]
    """Of the names of its data."""
    options: type[OptionGroup]
    """The options that only this format has; a base class of ``SourceOptions``."""
    shards: Callable[[DataOptions], list[str]]
    """The shards of the training data, which may be streamed; none for a format without shards."""
    source: Callable[[DataOptions, list[str], Reader, bool], Source]
    """Training samples, from the options, the shards and the reader; with True a progress bar is shown."""
    samples: Callable[[str, SourceOptions, Skips, str], list[Sample]]
    """Evaluation samples of data with this name; the last argument is what messages call the name."""
    cut_short: bool = False
    """Whether more may follow the ending, as in a URL."""


def _shards(options: DataOptions) -> list[str]:
    from .shard_names import expand_shards

    return expand_shards(options.source, "train_data", options.allow_pipe)


def _shard_source(options: DataOptions, shards: list[str], reader: Reader, progress: bool) -> Source:
    from .shards import ShardSource

    first = reader.rank * len(shards) // reader.world_size  # a rank finds in the cache what others have read
    return ShardSource(shards, reader.skips, options.workers, first, options.data_retries, progress)


def _shard_samples(source: str, options: SourceOptions, skips: Skips, argument: str) -> list[Sample]:
    from .shard_names import expand_shards
    from .shards import tar_samples

    return tar_samples(expand_shards(source, argument), skips, argument)


FORMATS = {
    "csv": Format(
        "a CSV file",
        (".csv", ".tsv"),
        CsvOptions,
        lambda options: [],
        lambda options, shards, reader, progress: CsvSource(
            options.source, options, reader.skips, options.data_retries
        ),
        csv_samples,
    ),
    "webdataset": Format(
        "shards",
        (".tar",),
        OptionGroup,
        _shards,
        _shard_source,
        _shard_samples,
        cut_short=True,
    ),
}
"""By the names that ``dataset_type`` gives them."""


def name_of_format(source: str | None, dataset_type: str = "auto") -> str | None:
    """The name of a source's format; None without a source, or if its name does not tell.

    Args:
        dataset_type: a format, or "auto" for the one that the source's ending tells.
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
