"""``StudyRun``: the config file of one run, which is named after the file."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from clipup.moe.config import MoEConfig
from clipup.precision import Precision

SUFFIX = ".yaml"


@dataclass(frozen=True)
class StudyRun:
    """One run. An invalid value raises ``ValueError`` or ``TypeError`` naming the file and the field."""

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
        for one in dataclasses.fields(self):
            expected = _TYPES.get(one.name)
            value = getattr(self, one.name)
            if expected and (not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected)):
                raise TypeError(f"{one.name} must be {_named(expected)}, got {value!r}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")
        object.__setattr__(self, "others", tuple(self.others))
        for other in self.others:
            if not isinstance(other, str):
                raise TypeError(f"others must be names of runs, got {other!r}")
        for field_name in ("start", "others", "teacher"):
            given = getattr(self, field_name)
            if self.name in (given if field_name == "others" else (given,)):
                raise ValueError(f"{field_name} must be another run, got the run's own name {self.name!r}")
        if not (self.moe_lr_scale > 0 and math.isfinite(self.moe_lr_scale)):
            raise ValueError(f"moe_lr_scale must be a positive number, got {self.moe_lr_scale}")
        if self.moe_lr_scale != 1 and self.moe is None:
            raise ValueError("moe_lr_scale is for sparse layers: set moe, or leave it out")
        if (self.others or self.clusters) and (self.start is None or self.moe is None):
            raise ValueError("others and clusters make a dense start sparse: set start and moe, or leave them out")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if self.moe is not None:
            object.__setattr__(self, "moe_cfg", MoEConfig.clip_up(**{"towers": ("image", "text"), **self.moe}))

    @property
    def needed(self) -> tuple[str, ...]:
        """The runs that must be done before this one."""
        found = (self.start, *self.others, self.teacher)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def to_dict(self) -> dict[str, Any]:
        """Everything the run depends on, for its log; fields of rare arms are left out where they say nothing."""
        rare = {one.name: one.default for one in dataclasses.fields(self) if one.name in _RARE}
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name not in rare or value != rare[name]}
        values["moe_cfg"] = None if self.moe_cfg is None else self.moe_cfg.to_dict()
        return values


_RARE = ("others", "clusters", "teacher", "moe_lr_scale")
_TYPES: dict[str, tuple[type, ...]] = {
    "others": (list, tuple),
    "clusters": (bool,),
    "teacher": (str, type(None)),
    "moe_lr_scale": (float, int),
    "arm": (str,),
    "model": (str,),
    "why": (str,),
    "precision": (str,),
    "start": (str, type(None)),
    "budget": (int, type(None)),
    "moe": (dict, type(None)),
    **dict.fromkeys(("steps", "seed", "batch_size", "warmup"), (int,)),
    **dict.fromkeys(("lr", "wd", "grad_clip_norm"), (float, int)),
}


def read(file: str | Path) -> StudyRun:
    """
    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, invalid YAML, or an unknown, missing or invalid field.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path} of a run")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no fields of a run, expected lines such as `steps: 5000`")
    known = {one.name for one in dataclasses.fields(StudyRun) if one.init} - {"name"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    missing = [name for name in ("arm", "model", "steps", "lr") if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return StudyRun(name=path.stem, **values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def beside(file: str | Path, name: str) -> Path:
    """The config file of another run of the same study."""
    return Path(file).with_name(f"{name}{SUFFIX}")


def _named(types: tuple[type, ...]) -> str:
    return " or ".join("null" if one is type(None) else one.__name__ for one in types)
