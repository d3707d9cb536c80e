"""Options of a training run. Options shared with open_clip_train have the same names and meanings.

One flat ``TrainOptions``, from a dataclass per job; ``clipup train --help`` shows the same groups.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, cast, get_type_hints

from ...data.options import TrainingDataOptions
from ...moe.config import MoEConfig
from ...option_group import OptionGroup, conform
from ...precision import Precision
from .data import EvaluationOptions, ImageTransformOptions
from .model import LossOptions, ModelOptions, TrainedPartsOptions
from .optimization import OptimizationOptions
from .running import (
    ParallelOptions,
    ProcessOptions,
    RemoteSyncOptions,
    ReportingOptions,
    RunDirectoryOptions,
    SpeedOptions,
)

GROUPS: dict[str, type[OptionGroup]] = {
    "model": ModelOptions,
    "training_data": TrainingDataOptions,
    "image_transforms": ImageTransformOptions,
    "evaluation": EvaluationOptions,
    "trained_parts": TrainedPartsOptions,
    "optimization": OptimizationOptions,
    "loss": LossOptions,
    "precision_and_speed": SpeedOptions,
    "processes": ProcessOptions,
    "parallelism": ParallelOptions,
    "run_directory": RunDirectoryOptions,
    "remote_sync": RemoteSyncOptions,
    "reporting": ReportingOptions,
}
"""The groups of options by the titles that ``clipup train --help`` gives them; every option is in one of them."""


@dataclass(kw_only=True)
class TrainOptions(
    ReportingOptions,
    RemoteSyncOptions,
    RunDirectoryOptions,
    ParallelOptions,
    ProcessOptions,
    SpeedOptions,
    LossOptions,
    OptimizationOptions,
    TrainedPartsOptions,
    EvaluationOptions,
    ImageTransformOptions,
    TrainingDataOptions,
    ModelOptions,
):
    """Trains a CLIP, dense or sparse, on image-text pairs.

    Most runs need few options: --model, --pretrained and --moe; --train-data, and --val-data to measure retrieval;
    --batch-size, --lr, and --steps or --epochs; --precision; --name.

    Example: clipup train --model ViT-B-16 --pretrained laion2b_s34b_b88k --moe --train-data 'data/{000..099}.tar'
    --train-num-samples 1000000 --batch-size 512 --lr 5e-5 --steps 20000 --name b16-moe

    Several ranks: torchrun --nproc-per-node 8 -m clipup -- train --model ...
    """

    moe_cfg: MoEConfig = field(default_factory=MoEConfig.clip_up)
    """Sparse layers for --moe; the defaults are CLIP-UP's recipe."""

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainOptions)
        for option in dataclasses.fields(TrainOptions):
            value = conform(option.name, getattr(self, option.name), hints[option.name])
            setattr(self, option.name, value)
        for group in GROUPS.values():
            group.check(self)
        if self.resume_dense is not None and (not self.moe or self.opt != "adamw" or self.pretrained is not None):
            raise ValueError(
                "resume_dense starts a sparse model from a dense run's weights and AdamW's moments: it needs moe and "
                "opt adamw, and no pretrained. To continue the dense run use resume"
            )

    def precision_on(self, device_type: str) -> Precision:
        """The precision of a run on "cuda" or "cpu"."""
        on_cuda = "amp_bf16" if self.is_sharded else "amp"
        return cast(Precision, self.precision or (on_cuda if device_type == "cuda" else "fp32"))

    def to_json(self) -> str:
        """All options as JSON, for the options.json of a run."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["moe_cfg"] = self.moe_cfg.to_dict() if self.moe else None
        return json.dumps(values, indent=2) + "\n"
