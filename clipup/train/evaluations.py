"""Evaluations along the way: on the validation data, and by the callbacks of the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..evaluate.retrieval import NonFiniteFeatures
from . import parallel, rng
from .distributed import Ranks
from .finite import FiniteGuard
from .options import TrainOptions
from .reports import Reports
from .run_state import Clock, RunState

Evaluation = Callable[[nn.Module], dict[str, Any] | None]
"""A function of the model (not wrapped) that returns numbers to record, or None."""


class Evaluations:
    """Runs evaluations so that they leave generators, modes and the clock as they were."""

    def __init__(
        self,
        options: TrainOptions,
        validate: Evaluation | None,
        model: nn.Module,
        state: RunState,
        clock: Clock,
        guard: FiniteGuard,
        ranks: Ranks,
        reports: Reports,
    ) -> None:
        """validate: the evaluation on the validation data, which all ranks share; None where there are none."""
        self._every = options.val_frequency
        self._sharded = parallel.is_sharded(options)
        self._validate, self._model = validate, model
        self._state, self._clock, self._guard, self._ranks, self._reports = state, clock, guard, ranks, reports

    def validate_epoch(self) -> None:
        """At an epoch's end, validates if the epoch is one of those that are validated."""
        if self._state.epoch and self._every and self._state.epoch % self._every == 0:
            self.validate()

    def validate(self) -> None:
        """Evaluates on the validation data, unless that was done at this step.

        Raises:
            NonFiniteWeights: a feature is NaN or infinite.
        """
        if self._validate is None or self._state.evaluated_at == self._state.step:
            return
        try:
            self._state.evaluation = self.run(self._validate, shared=True)
        except NonFiniteFeatures as error:
            raise self._guard.diverged(f"{error} (evaluation at step {self._state.step})") from error
        self._state.evaluated_at = self._state.step

    def run(self, evaluation: Evaluation, shared: bool = False) -> dict[str, Any] | None:
        """On all ranks when it is shared, or when no rank has all weights. Otherwise on rank 0, and the others wait as
        long as it takes."""
        numbers = None
        self._ranks.doing("evaluating", self._state.step)
        if self._ranks.first or shared or self._sharded:
            with rng.preserved(self._ranks.device):
                numbers = evaluation(self._model)
            self._model.train()
            if self._ranks.first and numbers is not None:
                self._reports.evaluation(numbers)
        self._ranks.barrier()
        self._clock.restart()
        return numbers
