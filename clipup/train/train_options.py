"""``TrainOptions``: all options of a training run, composed of the groups that its components own.

Options shared with open_clip_train have the same names and meanings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_type_hints

from ..data.formats import idle_options, name_of_format
from ..data.options import StepOptions, TrainingDataOptions
from ..moe.config import MoEConfig
from ..moe.options import UNUSED, SparseOptions
from ..option_group import OptionGroup, Resumed, all_idle, conform
from ..precision import Precision
from .checkpoints.options import RunDirectoryOptions
from .evaluation_options import EvaluationOptions
from .log.options import ReportingOptions
from .model_options import ImageTransformOptions, ModelOptions, SpeedOptions
from .objectives.options import LossOptions
from .optimizer.options import OptimizationOptions, TrainedPartsOptions
from .parallel.options import ParallelOptions, ProcessOptions


@dataclass(kw_only=True)
class TrainOptions(OptionGroup):
    """Trains a CLIP, dense or sparse, on image-text pairs.

    Example: clipup train --model ViT-B-16 --pretrained laion2b_s34b_b88k --moe --train-data 'data/{000..099}.tar'
    --train-num-samples 1000000 --batch-size 512 --lr 5e-5 --steps 20000 --name b16-moe

    Several ranks: torchrun --nproc-per-node 8 -m clipup -- train --model ...
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    sparse: SparseOptions = field(default_factory=SparseOptions)
    data: TrainingDataOptions = field(default_factory=TrainingDataOptions)
    step: StepOptions = field(default_factory=StepOptions)
    transforms: ImageTransformOptions = field(default_factory=ImageTransformOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    trained_parts: TrainedPartsOptions = field(default_factory=TrainedPartsOptions)
    optimizer: OptimizationOptions = field(default_factory=OptimizationOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    checkpoints: RunDirectoryOptions = field(default_factory=RunDirectoryOptions)
    reports: ReportingOptions = field(default_factory=ReportingOptions)

    def __post_init__(self) -> None:
        for group in self.groups():
            hints = get_type_hints(type(group))
            for each in fields(group):
                setattr(group, each.name, conform(each.name, getattr(group, each.name), hints[each.name]))
        self.check()

    @classmethod
    def flat(cls, **values: Any) -> TrainOptions:
        """The options by their own names, each put into its group: ``TrainOptions.flat(lr=1e-3, batch_size=256)``.

        Raises:
            TypeError: a name is not an option, or a value is not of the option's type.
            ValueError: a value is out of range, or some do not go together.
        """
        made: dict[str, Any] = {}
        for name, kind in GROUPS.items():
            own = [each.name for each in fields(kind) if each.name in values]
            made[name] = kind(**{option: values.pop(option) for option in own})
        if values:
            raise TypeError(f"{', '.join(values)}: not an option of training")
        return cls(**made)

    def changed(self, **values: Any) -> TrainOptions:
        """A copy with other values of some options, by their own names."""
        return self.flat(**self._by_name() | values)

    def groups(self) -> Iterator[OptionGroup]:
        return (getattr(self, name) for name in GROUPS)

    def _by_name(self) -> dict[str, Any]:
        return {each.name: getattr(group, each.name) for group in self.groups() for each in fields(group)}

    def check(self) -> None:
        super().check()
        model, opt, precision = self.model, self.optimizer.opt, self.speed.precision
        if model.resume_dense is not None and (not model.moe or opt != "adamw" or model.pretrained is not None):
            raise ValueError(
                "resume_dense starts a sparse model from a dense run's weights and AdamW's moments: it needs moe and "
                "opt adamw, and no pretrained. To continue the dense run use resume"
            )
        in_float = precision in (None, "fp32", "amp_bf16")
        if self.parallel.is_sharded and (opt != "adamw" or self.speed.torchcompile or not in_float):
            raise ValueError(
                f"fsdp and ep work with opt 'adamw', precision 'fp32' or 'amp_bf16', and without torchcompile; got opt "
                f"{opt!r}, precision {precision!r}, torchcompile {self.speed.torchcompile}"
            )

    def idle(self) -> dict[str, str]:
        unused = {} if self.model.moe else all_idle(MoEConfig, UNUSED)
        trained_on = name_of_format(self.data.train_data, self.data.dataset_type)
        return super().idle() | unused | idle_options(trained_on, name_of_format(self.evaluation.val_data))

    def precision_on(self, device_type: str) -> Precision:
        """The precision of a run on "cuda" or "cpu"."""
        on_cuda = "amp_bf16" if self.parallel.is_sharded else "amp"
        return cast(Precision, self.speed.precision or (on_cuda if device_type == "cuda" else "fp32"))

    @property
    def moe_cfg(self) -> MoEConfig | None:
        """The config of the sparse layers; None for a model that is not made sparse."""
        return self.sparse.moe_cfg if self.model.moe else None

    def values(self) -> dict[str, Any]:
        """All options by name as JSON has them, in the order of the groups. ``moe_cfg`` is None for a model that is not
        made sparse."""
        layers = None if self.moe_cfg is None else self.moe_cfg.to_dict()
        return json.loads(json.dumps(self._by_name() | {"moe_cfg": layers}))


GROUPS: dict[str, type[OptionGroup]] = {each.name: cast(Any, each.default_factory) for each in fields(TrainOptions)}
"""The groups of options by their names in ``TrainOptions``."""
RESUMED: dict[str, Resumed] = {
    each.name: each.metadata["resumed"] for group in GROUPS.values() for each in fields(group)
}
"""What a change of each option means for a resumed run."""
