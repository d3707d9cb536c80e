"""``StudyRun``: the config file of one run, which is named after the file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipup.moe.config import MoEConfig

SUFFIX = ".yaml"


@dataclass(frozen=True)
class StudyRun:
    """One run. What training is told, ``TrainOptions`` checks."""

    name: str
    arm: str
    """The method compared; runs of one arm differ in seed, steps and learning rate."""
    model: str
    """Name of a model of open_clip or clipup."""
    steps: int
    lr: float
    """Peak learning rate of a warmup and cosine decay to 0."""
    seed: int = 0
    """Seed of weights, routers and data order."""
    start: str | None = None
    """The run whose model this one starts from. None: random weights."""
    budget: int | None = None
    """Steps of the CLIP-UP run whose FLOPs or seconds this run matches. None: its own steps."""
    moe: dict[str, Any] | None = None
    """Overrides of ``MoEConfig.clip_up()``; {} is the preset itself, None a dense model."""
    others: tuple[str, ...] = ()
    """Dense runs beside ``start`` whose MLPs become experts too: expert e is from run e modulo their number."""
    clusters: bool = False
    """Whether experts and router are initialized from clusters of what the dense model's MLPs see."""
    teacher: str | None = None
    """The run whose model's similarities are a second target."""
    moe_lr_scale: float = 1.0
    """Factor of the learning rate of routers and experts."""
    why: str = ""
    """Purpose of the run, in one sentence."""
    batch_size: int = 256
    warmup: int = 250
    wd: float = 0.1
    grad_clip_norm: float = 1.0
    precision: str = "fp32"
    moe_cfg: MoEConfig | None = field(init=False, default=None)
    """The config of the sparse layers, from ``moe``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", tuple(self.others))
        if (self.others or self.clusters) and (self.start is None or self.moe is None):
            raise ValueError("others and clusters make a dense start sparse: set start and moe, or leave them out")
        if self.moe is not None:
            object.__setattr__(self, "moe_cfg", MoEConfig.clip_up(**{"towers": ("image", "text"), **self.moe}))

    @property
    def needed(self) -> tuple[str, ...]:
        """The runs that must be done before this one."""
        return tuple(dict.fromkeys(name for name in (self.start, *self.others, self.teacher) if name is not None))

    def to_dict(self) -> dict[str, Any]:
        """Everything the run depends on, for its log; fields of rare arms are left out where they say nothing."""
        values = {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if one.name not in _RARE or getattr(self, one.name) != one.default
        }
        return values | {"moe_cfg": None if self.moe_cfg is None else self.moe_cfg.to_dict()}


_RARE = ("others", "clusters", "teacher", "moe_lr_scale")


def read(file: str | Path) -> StudyRun:
    """
    Raises:
        FileNotFoundError, ValueError, TypeError, yaml.YAMLError: no such file, or an unknown, missing or invalid field.
    """
    path = Path(file)
    try:
        return StudyRun(path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def beside(file: str | Path, name: str) -> Path:
    """The config file of another run of the same study."""
    return Path(file).with_name(f"{name}{SUFFIX}")
