"""Options of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import checks
from ..option_group import OptionGroup, option

START = Path(__file__).parent / "start"
"""The dense model in the package, trained on icons without the sets that the demonstration uses."""


@dataclass(kw_only=True)
class DemoOptions(OptionGroup):
    """Upcycles a small CLIP, trains it on pictograms, and compares it with the dense baseline (continued training).

    Example: clipup demo --out runs/demo
    """

    out: str = "runs/demo"
    """Directory for the report, the runs and the data."""
    data: str | None = None
    """Directory of a data set written by `clipup data`. None: the pictograms, built once in OUT/data."""
    start: str = str(START)
    """Directory of the dense model to start from; the default was trained on other icons."""
    continue_steps: int = option(400, least=1)
    """Steps for which the dense and the sparse model continue training."""
    batch_size: int = option(256, least=1)
    """Pairs per step."""
    continue_lr: float = 2e-3
    """Peak learning rate of continued training, dense and sparse."""
    eval_every: int = option(100, least=1)
    """Steps between points of the R@1 curves."""
    seed: int = 0
    """Seed of weights and data order."""
    overwrite: bool = False
    """Replace the report and the runs of an earlier demonstration in OUT; its data are reused."""

    def check(self) -> None:
        super().check()
        checks.directory(self.start, "that of the dense model to start from", "start")
