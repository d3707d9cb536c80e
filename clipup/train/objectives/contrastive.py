"""CLIP's loss.

Axis legend of the losses: ``B`` pairs of a rank, ``N`` pairs of all ranks, ``D`` width of the features. A rank's logits
are [B, N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from open_clip.loss import ClipLoss, gather_features
from torch import Tensor, nn

from ...precision import Precision
from ..parallel.ranks import Ranks
from .chunked import sum_over_chunks
from .objective import FEATURES, Objective, gathering
from .options import LossOptions


class ContrastiveObjective(Objective):
    """CLIP's loss: softmax cross-entropy of every image against all texts, and of every text against all images."""

    def __init__(self, chunk_size: int | None = None, **gathering: Any) -> None:
        """chunk_size: rows of the logits that are computed at once."""
        self.loss = ChunkedClipLoss(chunk_size, **gathering)

    @classmethod
    def create(cls, options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        return cls(options.loss_chunk_size, **gathering(options, ranks))

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in FEATURES]
        return {"contrastive": self.loss(*features, output["logit_scale"], output.get("logit_bias"))}


class ChunkedClipLoss(ClipLoss):
    """open_clip's ClipLoss: the softmax cross-entropy of images to texts and of texts to images, half of each."""

    def __init__(self, chunk_size: int | None = None, **gathering: Any) -> None:
        """gathering: open_clip's local_loss, gather_with_grad, rank and world_size."""
        super().__init__(**gathering)
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        compared: Callable[[Tensor, Tensor], Tensor] = lambda logits, own: logits,
    ) -> Tensor:
        """
        Args:
            image_features, text_features: [B, D], normalized; row i of both is pair i.
            compared: maps logits of some rows, and the columns of their own pairs, to logits with -inf in columns that
                a row is not compared with.
        """
        images, texts = image_features, text_features
        if self.world_size > 1:
            how = self.local_loss, self.gather_with_grad, self.rank, self.world_size
            images, texts = gather_features(images, texts, *how)
            if not self.local_loss:
                image_features, text_features = images, texts
        own = self.get_ground_truth(image_features.device, len(image_features))
        per_image = self._mean(image_features, texts, own, logit_scale, logit_bias, compared)
        per_text = self._mean(text_features, images, own, logit_scale, logit_bias, compared)
        return (per_image + per_text) / 2

    def _mean(
        self,
        rows: Tensor,
        columns: Tensor,
        own: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        compared: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The mean cross-entropy of the rows; ``own[i]`` is the column of row i's own pair."""

        def loss_of(chunk: slice) -> Tensor:
            logits = scale * rows[chunk] @ columns.T
            logits = logits if bias is None else logits + bias
            return F.cross_entropy(compared(logits, own[chunk]), own[chunk], reduction="sum")

        return sum_over_chunks(loss_of, len(rows), len(columns), self.chunk_size) / len(rows)
