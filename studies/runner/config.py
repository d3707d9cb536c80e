"""``StudyRun``: one run of a study. The file ``study.yaml`` in a study's directory holds them as grids:

    model: clipup-icons-w64     # any field of ``StudyRun``, for all runs
    arms:                       # the fields of each arm
      clip_up: {moe: {}, start: "dense-5000-lr0.002-s{seed}", steps: 2500, why: CLIP-UP with its preset.}
    runs:                       # a list of arms, steps, rates or seeds stands for one run each
    - {arm: [clip_up], lr: [0.002, 0.004], seed: [0, 1, 2]}

A grid's fields replace those of the arm. Strings may name other fields of the run in braces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from clipup.moe.config import MoEConfig

FILE = "study.yaml"
_AXES = ("arm", "steps", "lr", "seed")
_NAME = "{arm}-{steps}-lr{lr}-s{seed}"


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
    clusters: bool = False
    """Whether experts and router are initialized from clusters of what the dense model's MLPs see."""
    views: bool = False
    """Whether every step sees fresh views of the icons (``icon_data.views``). The log then has NLL at the model's best
    temperature too."""
    validation_only: bool = False
    """Whether the test splits are left unmeasured, for runs by which something is chosen."""
    choice: str = ""
    """How tokens of the image tower choose experts if not by the router: ``random`` or ``position`` (``choices``)."""
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
        if (self.clusters or self.choice) and (self.start is None or self.moe is None):
            raise ValueError(
                "clusters and choice are of a dense start made sparse: set start and moe, or leave them out"
            )
        if self.moe is not None:
            object.__setattr__(self, "moe_cfg", MoEConfig.clip_up(**{"towers": ("image", "text"), **self.moe}))

    def to_dict(self) -> dict[str, Any]:
        """Everything the run depends on, for its log; those of ``_LEFT_OUT`` only where set."""
        values = {name: value for name in _NAMES if (value := getattr(self, name)) or name not in _LEFT_OUT}
        return values | {"moe_cfg": None if self.moe_cfg is None else self.moe_cfg.to_dict()}


_LEFT_OUT = ("clusters", "views", "validation_only", "choice")  # without a value
_NAMES = [each.name for each in dataclasses.fields(StudyRun)]


def read(study: str | Path) -> dict[str, StudyRun]:
    """The runs of a study's directory by name.

    Raises:
        FileNotFoundError, ValueError, yaml.YAMLError: no ``study.yaml``; an unknown, missing or invalid field; two runs
            of one name.
    """
    path = Path(study) / FILE
    common = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs: dict[str, StudyRun] = {}
    try:
        arms, grids = common.pop("arms"), common.pop("runs")
        for fields in (fields for grid in grids for fields in _expanded(grid, arms, common)):
            if fields["name"] in runs:
                raise ValueError(f"two runs are named {fields['name']}")
            runs[fields["name"]] = StudyRun(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}") from error
    return runs


def _expanded(grid: dict[str, Any], arms: dict[str, Any], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of each run of a grid."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in grid.items() if name in _AXES}
    for values in product(*lists.values()):
        cell = {"name": _NAME} | grid | dict(zip(lists, values, strict=True))
        of_arm = common | arms[cell["arm"]]
        fields: dict[str, Any] = {}
        for layer in (of_arm, cell):  # a string of the grid may name the arm's; one of the arm, a number of the grid
            values = of_arm | cell | fields
            fields |= {key: value.format(**values) if isinstance(value, str) else value for key, value in layer.items()}
        yield fields
