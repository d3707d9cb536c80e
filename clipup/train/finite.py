"""NaN and infinite values: steps with such gradients are skipped, and such weights are never written."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from ..models.state_dicts import not_finite
from .checkpoints.position import RunState
from .log.records import LOG
from .parallel.ranks import Ranks
from .step import StepResult

_ADVICE = "Lower lr, set grad_clip_norm (1.0), use another precision, or look for bad samples in the data"


class NonFiniteGradients(FloatingPointError):
    """The gradient was NaN or infinite in too many consecutive steps; none of them was applied."""


class NonFiniteWeights(FloatingPointError):
    """Weights, the optimizer's state or features became NaN or infinite. Such weights and states are not written."""


class FiniteGuard:
    """Checks the gradients and weights of a run, and counts the steps that were not applied.

    A non-finite loss has a non-finite gradient, so its step is not applied.
    """

    def __init__(self, most_in_row: int, state: RunState) -> None:
        """
        Args:
            state: of the run, in which steps are counted.
        """
        self.most_in_row = most_in_row
        self.state = state

    def count(self, done: StepResult, ranks: Ranks) -> None:
        """Counts a step. All ranks call this, and all have the same gradient.

        In float16 the gradient scaler finds its scale through steps that overflow. They do not count as consecutive as
        long as a lower scale can help: the loss is finite, and the scale was at least 1.

        Raises:
            NonFiniteGradients: more consecutive steps were not applied than allowed.
        """
        skipped, in_row = self.state.skipped_steps
        if done.applied:
            self.state.skipped_steps = skipped, 0
            return
        searching_scale = done.loss_scale >= 1 and not ranks.any(not math.isfinite(done.losses.total))
        skipped, in_row = self.state.skipped_steps = skipped + 1, in_row + (not searching_scale)
        norm = float(done.gradient_norm)
        if ranks.first:
            level = logging.INFO if searching_scale else logging.WARNING
            text = "step %d not applied: its gradient norm is %s (%d in a row, %d in all)"
            LOG.log(level, text, self.state.step, norm, in_row, skipped)
        if in_row > self.most_in_row:
            raise NonFiniteGradients(
                f"the gradient norm is {norm} at step {self.state.step}, the last of {in_row} steps in a row that were "
                f"not applied, more than max_nonfinite_steps={self.most_in_row}; {self._ending()}"
            )

    def check_weights(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        """Raises NonFiniteWeights on all ranks if weights or the optimizer's state hold values that are not finite."""
        moments = {
            f"the optimizer's {key} of parameter {index}": value
            for index, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        own = not_finite({**model.state_dict(), **moments})
        for name in filter(None, ranks.gather(own)):
            raise self.diverged(
                f"{name} holds values that are not finite at step {self.state.step}, so it was not saved"
            )

    def diverged(self, what: str) -> NonFiniteWeights:
        """The error with this message, and with the checkpoint to continue from."""
        return NonFiniteWeights(f"{what}; {self._ending()}")

    def _ending(self) -> str:
        last = self.state.last_checkpoint
        which = (
            "there is no checkpoint yet" if last is None else f"all values in the last checkpoint, {last}, are finite"
        )
        return f"{which}. {_ADVICE}"
