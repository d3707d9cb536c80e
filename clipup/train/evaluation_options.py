"""Options of what is measured during training and at its end."""

from __future__ import annotations

from dataclasses import dataclass

from ..option_group import OptionGroup, Resumed, option


@dataclass(kw_only=True)
class EvaluationOptions(OptionGroup):
    """What is measured during training and at its end."""

    val_data: str | None = option(None, Resumed.MEASURED)
    """CSV file or shards for retrieval after every val_frequency epochs and at the end. A .txt of a shard has a caption
    a line."""
    val_frequency: int = option(
        1, Resumed.FREE, least=0, idle={"without --val-data": lambda group: group.val_data is None}
    )
    """Epochs between two evaluations on val_data; 0 evaluates at the end only."""
    imagenet_val: str | None = option(None, Resumed.MEASURED)
    """Directory of ImageNet's validation images, with a subdirectory per class: zero-shot accuracy after every
    zeroshot_frequency epochs and at the end."""
    imagenet_v2: str | None = option(None, Resumed.MEASURED)
    """Directory of ImageNet-V2, with the subdirectories 0 to 999; as imagenet_val."""
    zeroshot_frequency: int = option(
        2,
        Resumed.FREE,
        least=0,
        idle={
            "without --imagenet-val or --imagenet-v2": lambda group: (
                group.imagenet_val is None and group.imagenet_v2 is None
            )
        },
    )
    """Epochs between two evaluations on ImageNet; 0 evaluates at the end only."""
