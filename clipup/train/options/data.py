"""Options of the data: what is trained on, and what is evaluated along the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...checks import check
from ...option_group import KeyValues, OptionGroup


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
