"""What a run calls along the way, what it returns, and how it ends early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .run_directory import Record


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; ``checkpoint`` is where to go on from."""

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class Every(NamedTuple):
    """Calls a function after every ``steps`` steps and after the last one, on rank 0.

    The function takes the model (not wrapped) and returns numbers to record, or None. It cannot disturb the run: random
    numbers drawn in it do not count, and neither does its time.
    """

    steps: int
    function: Callable[[nn.Module], dict[str, Any] | None]


class TrainResult(NamedTuple):
    """What a run leaves behind."""

    model: nn.Module
    """In evaluation mode."""
    steps: int
    """Optimizer steps done, those before a resume included."""
    seconds: float
    """Time in training, without evaluations and checkpoints."""
    history: list[Record]
    """A record a logged step, as ``clipup.train`` describes it; on rank 0."""
    evaluations: list[Record]
    directory: Path | None
    warnings: list[Record]
    """A record for every layer whose routing has collapsed, as ``clipup.train.collapse`` describes it; on rank 0."""
    skipped: int = 0
    """Samples of the training data that could not be read, each once."""
    already_finished: bool = False
    """Whether a resumed run had been finished before, so that nothing was done and nothing written."""
