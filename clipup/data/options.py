"""Options of reading image-text pairs: of a format, of a source, of training data, and of the steps made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import check, one_of
from ..option_group import OptionGroup, Resumed, option
from ..precision import default_workers
from .csv_files import CsvOptions
from .formats import FORMATS, name_of_format
from .images import MAX_PIXELS
from .skips import MAX_SKIPPED, RETRIES


@dataclass(kw_only=True)
class SourceOptions(CsvOptions):
    """How a source of image-text pairs is read, for training and for evaluation."""

    dataset_type: Literal["webdataset", "csv", "auto"] = option("auto", Resumed.SAMPLES)
    """Format of the data; auto goes by the ending of the name."""
    max_skipped: float = option(MAX_SKIPPED, Resumed.FREE)
    """Share of the samples that may be unreadable. Each is named once and left out, or replaced in indexed training
    data; above this share reading stops with an error."""
    max_image_pixels: int = option(MAX_PIXELS, Resumed.ORDER | Resumed.MEASURED, least=1)
    """Pixels of an image that is decoded at most; larger images, and shapes of more than 200:1, count as
    unreadable."""

    def check(self) -> None:
        super().check()
        one_of("dataset_type", self.dataset_type, ("auto", *FORMATS))
        check("max_skipped", self.max_skipped, 0 <= self.max_skipped <= 1, "a share from 0 to 1 (0.1: a tenth)")

    def format_of(self, source: str, argument: str) -> str:
        """The name of a source's format.

        Raises ValueError, naming `argument`, when neither `dataset_type` nor the name tells.
        """
        name = name_of_format(source, self.dataset_type)
        if name is None:
            expected = ", ".join(ending for each in FORMATS.values() for ending in each.endings)
            raise ValueError(
                f"{argument}: cannot tell the format of {source!r} from its name, expected {expected}: rename it, or "
                "set dataset_type"
            )
        return name


@dataclass(kw_only=True)
class TrainingDataOptions(SourceOptions):
    """The image-text pairs to train on, and how they are read."""

    train_data: str | None = option(None, Resumed.IDENTITY, own_rank=True)
    """A directory that clipup data wrote, WebDataset shards ("data/{000..099}.tar", several joined by "::"), or a CSV
    file. A .txt of a shard is one caption, whatever it holds; several are listed as captions in the sample's .json."""
    train_num_samples: int | None = option(None, Resumed.SAMPLES, least=1)
    """Samples in an epoch. None: all. Needed for shards by URL."""
    dataset_resampled: bool = option(
        False,
        Resumed.SAMPLES,
        idle={"on a CSV file": lambda group: name_of_format(group.train_data, group.dataset_type) == "csv"},
    )
    """Draw shards with replacement, and stream them."""
    train_data_upsampling_factors: str | None = option(None, Resumed.SAMPLES)
    """With dataset_resampled: how often the shards of each source in train_data are drawn, relative to the others, such
    as "1::2" for "A::B"."""
    allow_pipe: bool = option(False, Resumed.FREE, own_rank=True)
    """Let pipe:COMMAND in train_data run its command in a shell. Only for a train_data that you trust."""
    data_retries: int = option(RETRIES, Resumed.FREE, least=0, own_rank=True)
    """Further tries, after 2, 4, 8, ... seconds (at most a minute), where reading a file or opening a shard by URL
    fails with an error that may be temporary."""
    cache_data: bool = option(False, Resumed.ORDER)
    """Decode and tokenize the whole training set once and keep it in memory (small sets)."""
    workers: int = option(factory=default_workers, resumed=Resumed.STREAM, least=0, own_rank=True)
    """Data loader processes per rank."""

    @property
    def source(self) -> str:
        """``train_data`` of a run that has some."""
        assert self.train_data is not None
        return self.train_data

    def check(self) -> None:
        super().check()
        if self.train_data_upsampling_factors is not None and not self.dataset_resampled:
            raise ValueError(
                "train_data_upsampling_factors needs dataset_resampled: only shards that are drawn with replacement "
                "can be drawn more often"
            )
        if self.cache_data and (self.dataset_resampled or self.train_num_samples is not None):
            name = "dataset_resampled" if self.dataset_resampled else "train_num_samples"
            raise ValueError(
                f"{name}: has no effect with cache_data, which serves every sample once per epoch: drop one"
            )


@dataclass(kw_only=True)
class StepOptions(OptionGroup):
    """Which samples a step has."""

    batch_size: int = option(64, Resumed.BATCH, least=1)
    """Images per batch and rank."""
    accum_freq: int = option(1, Resumed.BATCH, least=1)
    """Batches per step: the loss is over all of them, with the memory of one."""
    seed: int = option(0, Resumed.IDENTITY | Resumed.ORDER, least=0)
    """Seed of weights, data order and noise."""
