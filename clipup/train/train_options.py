"""``TrainOptions``: all options of a training run, put together from the groups that its components own.

Options shared with open_clip_train have the same names and meanings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, cast, get_type_hints

from ..data.formats import idle_options, name_of_format
from ..data.options import StepOptions, TrainingDataOptions
from ..moe.config import MoEConfig
from ..moe.options import SparseOptions
from ..option_group import Resumed, all_idle, conform
from ..precision import Precision
from .checkpoints.options import RunDirectoryOptions
from .evaluation_options import EvaluationOptions
from .log.options import RemoteSyncOptions, ReportingOptions
from .model_options import ImageTransformOptions, ModelOptions, SpeedOptions
from .objectives.options import LossOptions
from .optimizer.options import OptimizationOptions, TrainedPartsOptions
from .parallel.options import ParallelOptions, ProcessOptions


@dataclass(kw_only=True)
class TrainOptions(
    ModelOptions,
    SparseOptions,
    TrainingDataOptions,
    StepOptions,
    ImageTransformOptions,
    EvaluationOptions,
    TrainedPartsOptions,
    OptimizationOptions,
    LossOptions,
    SpeedOptions,
    ProcessOptions,
    ParallelOptions,
    RunDirectoryOptions,
    RemoteSyncOptions,
    ReportingOptions,
):
    """Trains a CLIP, dense or sparse, on image-text pairs.

    Example: clipup train --model ViT-B-16 --pretrained laion2b_s34b_b88k --moe --train-data 'data/{000..099}.tar'
    --train-num-samples 1000000 --batch-size 512 --lr 5e-5 --steps 20000 --name b16-moe

    Several ranks: torchrun --nproc-per-node 8 -m clipup -- train --model ...
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            setattr(self, each.name, conform(each.name, getattr(self, each.name), hints[each.name]))
        self.check()

    def check(self) -> None:
        super().check()
        if self.resume_dense is not None and (not self.moe or self.opt != "adamw" or self.pretrained is not None):
            raise ValueError(
                "resume_dense starts a sparse model from a dense run's weights and AdamW's moments: it needs moe and "
                "opt adamw, and no pretrained. To continue the dense run use resume"
            )
        in_float = self.precision in (None, "fp32", "amp_bf16")
        if self.is_sharded and (self.opt != "adamw" or self.torchcompile or not in_float):
            raise ValueError(
                f"fsdp and ep work with opt 'adamw', precision 'fp32' or 'amp_bf16', and without torchcompile; got opt "
                f"{self.opt!r}, precision {self.precision!r}, torchcompile {self.torchcompile}"
            )

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if not self.moe:
            idle |= all_idle(MoEConfig, "without --moe, which makes the model sparse")
        return idle | idle_options(name_of_format(self.train_data, self.dataset_type), name_of_format(self.val_data))

    def precision_on(self, device_type: str) -> Precision:
        """The precision of a run on "cuda" or "cpu"."""
        on_cuda = "amp_bf16" if self.is_sharded else "amp"
        return cast(Precision, self.precision or (on_cuda if device_type == "cuda" else "fp32"))

    def values(self) -> dict[str, Any]:
        """All options by name as JSON has them, in the order of the groups. ``moe_cfg`` is None for a model that is not
        made sparse."""
        names = [each.name for group in TrainOptions.__bases__ for each in fields(group)]
        values = {name: getattr(self, name) for name in names}
        return json.loads(json.dumps(values | {"moe_cfg": self.moe_cfg.to_dict() if self.moe else None}))


RESUMED: dict[str, Resumed] = {each.name: each.metadata["resumed"] for each in fields(TrainOptions)}
"""What a change of each option means for a resumed run."""
