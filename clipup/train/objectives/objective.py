"""The interface of a loss: its creation, its terms, and its cost in memory and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ...precision import Precision
from ..parallel.ranks import Ranks
from .chunked import LOGITS_AT_ONCE
from .options import LossOptions

Batch = tuple[Tensor, Tensor]
"""Images [B, 3, H, W] and texts [B, L]."""
Collective = Literal["all_gather", "reduce_scatter", "send"]
FEATURES = ("image_features", "text_features")
SCALES = ("logit_scale", "logit_bias")
"""Outputs with one value for the whole batch; the others have one row per pair."""


def named_output(output: Any) -> dict[str, Tensor]:
    """A CLIP's output by open_clip's names, whether the model returns a dict or a tuple."""
    if isinstance(output, dict):
        return dict(output)
    return dict(zip((*FEATURES, *SCALES), output, strict=False))


def gathering(options: LossOptions, ranks: Ranks) -> dict[str, Any]:
    """How open_clip's softmax losses gather the features of several ranks."""
    settings = {"local_loss": options.local_loss, "gather_with_grad": options.gather_with_grad}
    return {**settings, "rank": ranks.rank, "world_size": ranks.world_size}


class Objective:
    """A loss over image-text pairs, as named terms whose sum is minimized."""

    option: ClassVar[str] = ""
    """The training option that selects it; "" for those that are not selected by an option."""
    per_pair: ClassVar[tuple[str, ...]] = FEATURES
    """Model outputs that the objective needs, with one row per pair."""
    model_arguments: ClassVar[dict[str, float]] = {}
    """Arguments of open_clip's models that a model with random weights should be created with."""
    directions: ClassVar[int] = 2
    """How often the logits are computed: from images to texts, and from texts to images."""
    takes_bias: ClassVar[tuple[bool, ...]] = (False, True)
    """Whether it can train a model without, and with a logit_bias."""

    @classmethod
    def create(cls, options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        """The objective of a run. ``model``: the model that is trained."""
        return cls(**gathering(options, ranks))

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """What the loss compares the model's output with, over all batches of a step; computed once, without gradient.

        The usual target, that the image and the text of a pair match, needs nothing.
        """
        return {}

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss by name, weighted, as 0-d tensors.

        Args:
            output: the model's over all batches of the step: ``per_pair``, ``logit_scale``, ``logit_bias`` if any.
            targets: as ``targets`` returned them.
        """
        raise NotImplementedError

    @classmethod
    def rows(cls, options: LossOptions, own: int, gathered: int) -> int:
        """Rows of the logits that a rank computes, of ``own`` pairs of its own and ``gathered`` pairs of all ranks."""
        return own if options.local_loss else gathered

    @classmethod
    def bytes_per_logit(cls, precision: Precision) -> int:
        """Bytes saved for the backward pass of each logit (an image compared with a text), unless logits are computed
        in chunks. Here four bytes in each direction."""
        return 8

    @classmethod
    def memory(cls, options: LossOptions, own: int, gathered: int, precision: Precision) -> tuple[float, float]:
        """Bytes that a rank saves for the backward pass, and bytes that it works with beside them; as in ``rows``."""
        rows = cls.rows(options, own, gathered)
        at_once = min(rows, options.loss_chunk_size or max(1, LOGITS_AT_ONCE // gathered))
        logits = at_once * gathered / 2 if at_once < rows else rows * gathered
        return cls.bytes_per_logit(precision) * logits, 12 * at_once * gathered

    @classmethod
    def traffic(cls, options: LossOptions, own_bytes: int, ranks: int, trained_towers: int) -> dict[Collective, float]:
        """Bytes that a step's collectives are called with, for ``own_bytes`` of features of a tower on each rank. The
        features of both towers are gathered; their gradients come back to the towers that are trained."""
        gathered = own_bytes * ranks
        returned = trained_towers * gathered if options.gather_with_grad else 0
        return {"all_gather": 2 * gathered, "reduce_scatter": returned}
