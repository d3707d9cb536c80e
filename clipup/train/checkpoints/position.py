"""The position of a run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class RunState:
    """The position of a run: the entries of a checkpoint besides weights, optimizer and conditions."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Optimizer steps done."""
    step_of_epoch: int = 0
    """Optimizer steps done in the current epoch."""
    steps_before: int = 0
    """Extra steps of a run whose epochs had another length before (``Schedule.steps_before``)."""
    samples_seen: int = 0
    seconds: float = 0.0
    """Time in training, without evaluations and checkpoints."""
    skipped_steps: tuple[int, int] = (0, 0)
    """Steps that were not applied because their gradient was not finite: in all, and in a row up to now."""
    validated: dict[str, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    """The step of the last validation of each name, and its numbers, on rank 0."""
    evaluations: int | None = None
    """Records of evaluations at the last checkpoint; None: those up to the step."""
    skipped_samples: dict[str, int] = field(default_factory=dict)
    """Samples that could not be read, as of the last checkpoint."""
    finished: bool = False
    """Whether the run is complete and its model is saved."""
    last_checkpoint: Path | None = None
    """The last complete checkpoint. Not saved itself."""

    def state_dict(self) -> dict[str, Any]:
        """The entries of a checkpoint."""
        return copy.deepcopy({name: getattr(self, name) for name in _SAVED})

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Takes the entries of a checkpoint, which may have others too. ``finished`` remains False."""
        for name in _SAVED & checkpoint.keys() - {"finished"}:
            setattr(self, name, checkpoint[name])


_SAVED = {each.name for each in fields(RunState)} - {"last_checkpoint"}
