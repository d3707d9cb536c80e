"""What a run returns or raises, and what it calls along the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .log.records import Record


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP ended the run; resume from ``checkpoint``."""

    def __init__(self, message: str, checkpoint: Path) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class Every(NamedTuple):
    """Calls a function after every ``steps`` steps and after the last step, on rank 0.

    The function takes the model (not wrapped) and returns numbers to record, or None. It does not change the run: its
    random numbers do not count, and neither does its time.
    """

    steps: int
    function: Callable[[nn.Module], dict[str, Any] | None]


class TrainResult(NamedTuple):
    """The result of a run."""

    model: nn.Module
    """In evaluation mode."""
    steps: int
    """Optimizer steps done, those before a resume included."""
    seconds: float
    """Time in training, without evaluations and checkpoints."""
    history: list[Record]
    """A record per logged step, as ``clipup.train`` describes it; on rank 0."""
    evaluations: list[Record]
    directory: Path | None
    warnings: list[Record]
    """A record per layer whose routing has collapsed (``clipup.train.log.routing_collapse``); on rank 0."""
    skipped: int = 0
    """Samples of the training data that could not be read, each once."""
    already_finished: bool = False
    """Whether a resumed run was finished before, so that nothing was done or written."""
