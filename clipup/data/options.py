"""Options of reading image-text pairs: one dataclass from the command line's flags to the loader."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..checks import check, one_of
from .images import MAX_PIXELS
from .skips import MAX_SKIPPED, RETRIES

CSV_EXTENSIONS = (".csv", ".tsv")
_OF_A_RANK = ("train_data", "workers", "data_retries", "allow_pipe")
"""Options in which ranks may differ: where the files lie, and how they are read."""


class CsvFormat(NamedTuple):
    """The column separator, and the columns with image paths and captions."""

    separator: str = "\t"
    img_key: str = "filepath"
    caption_key: str = "title"


def is_csv(source: str | None, dataset_type: str = "auto") -> bool:
    """Whether a source of data is read as a CSV file."""
    return source is not None and (dataset_type == "csv" or dataset_type == "auto" and source.endswith(CSV_EXTENSIONS))


@dataclass(frozen=True)
class SourceOptions:
    """How a source of image-text pairs is read, for training and for evaluation.

    Raises ValueError, naming the option, for a value out of range.
    """

    dataset_type: Literal["webdataset", "csv", "auto"] = "auto"
    """Format of the data; auto goes by the file extension."""
    csv_separator: str = "\t"
    """Separates the columns of a CSV file."""
    csv_img_key: str = "filepath"
    """Column with the image paths."""
    csv_caption_key: str = "title"
    """Column with the captions. A cell is one caption, whatever it holds."""
    max_skipped: float = MAX_SKIPPED
    """Largest share of samples that may be unreadable. They are skipped, counted, and each is logged once; above this
    share reading stops with an error."""
    max_image_pixels: int = MAX_PIXELS
    """Largest image to decode, in pixels; larger ones, and those of a shape of more than 200:1, count as unreadable."""

    def __post_init__(self) -> None:
        one_of("dataset_type", self.dataset_type, ("auto", "webdataset", "csv"))
        check("max_skipped", self.max_skipped, 0 <= self.max_skipped <= 1, "a share from 0 to 1 (0.1: a tenth)")
        check("max_image_pixels", self.max_image_pixels, self.max_image_pixels >= 1, "at least 1")

    @property
    def csv_format(self) -> CsvFormat:
        return CsvFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)

    def format_of(self, source: str, argument: str) -> str:
        """The format of a source: csv or webdataset.

        Raises ValueError, naming `argument`, when neither `dataset_type` nor the name tells.
        """
        if is_csv(source, self.dataset_type):
            return "csv"
        if self.dataset_type == "webdataset" or ".tar" in os.path.basename(source):
            return "webdataset"
        raise ValueError(
            f"{argument}: cannot tell the format of {source!r} from its name, expected .tar, .csv or .tsv: rename "
            "it, or set dataset_type"
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions):
    """What training batches are made of."""

    train_data: str
    """WebDataset shards (a path, DIR/train-*.tar, DIR/train-{000000..000024}.tar, several joined by "::"), a CSV file,
    or a directory written by `clipup data` (its training shards). CSV files and local shards are indexed; shards by URL
    are streamed. A .txt of a shard is one caption; several are `captions` of the sample's .json."""
    batch_size: int
    """Samples per batch and process."""
    workers: int = 1
    """Processes that read samples (0: the calling process); with `cache` they only fill the cache."""
    seed: int = 0
    """Seed of the order of samples and the choice of captions."""
    accum_freq: int = 1
    """Batches per step; of indexed data, the samples of a step depend on their number and the batch size together."""
    train_num_samples: int | None = None
    """Samples per epoch, by default all; needed for shards by URL, and with dataset_resampled where no `sizes.json` is
    beside the shards."""
    dataset_resampled: bool = False
    """Draw shards with replacement, and stream them."""
    train_data_upsampling_factors: str | None = None
    """With dataset_resampled: how often the shards of each source in train_data are drawn, relative to the others, such
    as "1::2" for "A::B"."""
    cache: bool = False
    """Keep preprocessed images and tokens in memory; for small data sets (see `clipup.data.indexed`)."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` in `train_data` run its command in a shell."""
    data_retries: int = RETRIES
    """Further tries where reading a file, or opening a streamed shard, fails with an error that may be temporary; after
    2, 4, 8, ... seconds, at most about a minute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.train_num_samples
        for name, least in (("batch_size", 1), ("accum_freq", 1), ("data_retries", 0), ("workers", 0)):
            check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        check("train_num_samples", samples, samples is None or samples >= 1, "at least 1")
        if self.train_data_upsampling_factors is not None and not self.dataset_resampled:
            raise ValueError(
                f"train_data_upsampling_factors={self.train_data_upsampling_factors!r} needs dataset_resampled: only "
                "shards that are drawn with replacement can be drawn more often"
            )
        if self.cache and (self.dataset_resampled or self.train_num_samples is not None):
            name = "dataset_resampled" if self.dataset_resampled else "train_num_samples"
            raise ValueError(f"{name}: has no effect with cache, which serves every sample once per epoch: drop one")

    def of_all_ranks(self) -> dict[str, Any]:
        """The options that must be the same on all ranks, by name."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_A_RANK}
