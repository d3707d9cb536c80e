"""The directory of a trained model, which loads without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..models import saving
from .parallel import whole_state
from .parallel.ranks import Ranks
from .setup import Built


class TrainedModel(NamedTuple):
    """The model directory that is saved at the end of a run."""

    path: Path
    built: Built
    base_model: str | None
    """For the model card."""
    unsharded: nn.Module | None
    """A copy of a sharded model without weights, hooks and meshes."""

    def save(self, ranks: Ranks, results: list[dict[str, Any]]) -> None:
        """Writes it, with results of evaluations in its card. A collective."""
        if self.built.model_cfg is None:
            return
        weights = whole_state.weights(self.built.model, keep=ranks.first)
        ranks.on_first(lambda: self._write(weights, results))

    def _write(self, weights: dict[str, Any], results: list[dict[str, Any]]) -> None:
        model, model_cfg = self.built.model, self.built.model_cfg
        if self.unsharded is not None:
            model = self.unsharded
            model.load_state_dict(weights, assign=True)
        files = self.built.tokenizer_files
        saving.save_with_tokenizer(model, self.path, model_cfg, files, base_model=self.base_model, results=results)
