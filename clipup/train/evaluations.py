"""Evaluations along the way: on the validation data, and by the callbacks of the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..evaluate.retrieval import NonFiniteFeatures
from .checkpoints import rng
from .checkpoints.run_state import Clock, RunState
from .finite import FiniteGuard
from .ranks.distributed import Ranks
from .ranks.parallel import share_batch_statistics
from .reports import Reports
from .validations import Validation

Evaluation = Callable[[nn.Module], dict[str, Any] | None]
"""A function of the model (not wrapped) that returns numbers to record, or None."""


class Evaluations:
    """Runs evaluations so that they leave generators, modes and the clock as they were."""

    def __init__(
        self,
        validations: Sequence[Validation],
        model: nn.Module,
        state: RunState,
        clock: Clock,
        guard: FiniteGuard,
        ranks: Ranks,
        reports: Reports,
        sharded: bool,
    ) -> None:
        """validations: measurements that all ranks share. sharded: whether no rank has all weights of the model."""
        self._validations, self._model, self._sharded = validations, model, sharded
        self._state, self._clock, self._guard, self._ranks, self._reports = state, clock, guard, ranks, reports

    def validate_epoch(self) -> None:
        """At an epoch's end, the validations that are due then."""
        for validation in self._validations:
            if self._state.epoch and validation.every and self._state.epoch % validation.every == 0:
                self._validate(validation)

    def validate(self) -> None:
        """All validations, except those that were done at this step."""
        for validation in self._validations:
            self._validate(validation)

    def _validate(self, validation: Validation) -> None:
        """
        Raises:
            NonFiniteWeights: a feature is NaN or infinite.
        """
        step = self._state.step
        if self._state.validated.get(validation.name, (-1,))[0] == step:
            return
        try:
            self._state.validated[validation.name] = step, self.run(validation.measure, shared=True)
        except NonFiniteFeatures as error:
            raise self._guard.diverged(f"{error} (evaluation at step {step})") from error

    def run(self, evaluation: Evaluation, shared: bool = False) -> dict[str, Any] | None:
        """On all ranks when it is shared, or when no rank has all weights. Otherwise on rank 0, and the others wait as
        long as it takes."""
        numbers = None
        share_batch_statistics(self._model, self._ranks)
        if self._ranks.first or shared or self._sharded:
            with rng.preserved(self._ranks.device):
                numbers = evaluation(self._model)
            self._model.train()
            if self._ranks.first and numbers is not None:
                self._reports.evaluation(numbers)
        self._ranks.first_does(lambda: None)  # the others wait
        self._clock.restart()
        return numbers
