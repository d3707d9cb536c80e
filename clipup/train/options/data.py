"""Options of the data: what is trained on, and what is evaluated along the way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ...checks import check
from ...data.options import DataOptions, SourceOptions
from ...option_group import KeyValues, OptionGroup
from ...precision import default_workers


@dataclass(kw_only=True)
class TrainingDataOptions(OptionGroup):
    """The image-text pairs to train on, and how they are read."""

    train_data: str | None = None
    """A directory that clipup data wrote, WebDataset shards ("data/{000..099}.tar", several joined by "::"), or a CSV
    file. A .txt of a shard is one caption, whatever it holds; several are listed as captions in the sample's .json."""
    train_num_samples: int | None = None
    """Samples in an epoch. None: all. Needed for shards by URL."""
    dataset_type: Literal["webdataset", "csv", "auto"] = DataOptions.dataset_type
    """What train_data is; auto goes by its ending."""
    dataset_resampled: bool = DataOptions.dataset_resampled
    """Draw shards with replacement, and stream them."""
    train_data_upsampling_factors: str | None = DataOptions.train_data_upsampling_factors
    """With dataset_resampled: how often the shards of each source in train_data are drawn, relative to the others, such
    as "1::2" for "A::B"."""
    csv_separator: str = DataOptions.csv_separator
    """Separates the columns of a CSV file."""
    csv_img_key: str = DataOptions.csv_img_key
    """Column with the paths of the images."""
    csv_caption_key: str = DataOptions.csv_caption_key
    """Column with the captions. A cell is one caption, whatever it holds."""
    max_skipped: float = DataOptions.max_skipped
    """Share of the samples that may be unreadable: they are replaced in indexed data and left out of streamed data,
    each is named once, and the last line says how many. Above it the run stops."""
    max_image_pixels: int = DataOptions.max_image_pixels
    """Pixels of an image that is decoded at most; one of more counts as unreadable."""
    allow_pipe: bool = DataOptions.allow_pipe
    """Let pipe:COMMAND in train_data run its command in a shell. Only for a train_data that you trust."""
    data_retries: int = DataOptions.data_retries
    """Further tries, after 2, 4, 8, ... seconds (at most a minute), where reading a file or opening a shard by URL
    fails with an error that may be temporary."""
    cache_data: bool = DataOptions.cache
    """Decode and tokenize the whole training set once and keep it in memory (small sets)."""
    workers: int = field(default_factory=default_workers)
    """Data loader processes per rank."""

    def check(self) -> None:
        self.data_options()  # checks them

    def data_options(self) -> DataOptions:
        """How the training data are read."""
        names = {field.name for field in dataclasses.fields(DataOptions)} - {"cache"}
        return DataOptions(**{name: getattr(self, name) for name in names}, cache=self.cache_data)

    def val_data_options(self) -> SourceOptions:
        """How ``val_data`` is read; its format goes by its file extension."""
        names = {field.name for field in dataclasses.fields(SourceOptions)} - {"dataset_type"}
        return SourceOptions(**{name: getattr(self, name) for name in names})


@dataclass(kw_only=True)
class ImageTransformOptions(OptionGroup):
    """How images become the model's input; None keeps what belongs to the weights."""

    aug_cfg: KeyValues = field(default_factory=dict)
    """Augmentations in training, KEY=VALUE: fields of open_clip's AugmentationCfg, such as scale="(0.4, 1.0)"
    color_jitter=0.4 use_timm=True."""
    image_mean: tuple[float, ...] | None = None
    """Mean of the channels that is subtracted, one value or three."""
    image_std: tuple[float, ...] | None = None
    """Standard deviation of the channels that is divided by, one value or three."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    """How images are resized. In training it needs aug_cfg use_timm=True; otherwise training images are resized
    bicubically."""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How images get the model's shape in evaluation: crop what exceeds it, pad what is short of it, or distort."""

    def check(self) -> None:
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            check(name, value, value is None or len(value) in (1, 3), "one value or three")

    def transform_arguments(self) -> dict[str, Any]:
        """The arguments of open_clip's factory about transforms that differ from its defaults."""
        names = ("image_mean", "image_std", "image_interpolation", "image_resize_mode", "aug_cfg")
        values = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, {})}
        for name in {"image_mean", "image_std"} & values.keys():
            values[name] *= 3 // len(values[name])
        return values


@dataclass(kw_only=True)
class EvaluationOptions(OptionGroup):
    """What is measured during training and at its end."""

    val_data: str | None = None
    """CSV file or shards for retrieval after every val_frequency epochs and at the end. A .txt of a shard has a caption
    a line."""
    val_frequency: int = 1
    """Epochs between two evaluations on val_data; 0 evaluates at the end only."""
    imagenet_val: str | None = None
    """Directory of ImageNet's validation images, with a subdirectory per class: zero-shot accuracy after every
    zeroshot_frequency epochs and at the end."""
    imagenet_v2: str | None = None
    """Directory of ImageNet-V2, with the subdirectories 0 to 999; as imagenet_val."""
    zeroshot_frequency: int = 2
    """Epochs between two evaluations on ImageNet; 0 evaluates at the end only."""

    def check(self) -> None:
        self.at_least(0, "val_frequency", "zeroshot_frequency")
