"""SigLIP's loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor, nn

from ...precision import Precision
from ..parallel.ranks import Ranks
from .chunked import LOGITS_AT_ONCE, sum_over_chunks
from .contrastive import ContrastiveObjective
from .objective import Collective, Objective
from .options import LossOptions


class SigmoidObjective(ContrastiveObjective):
    """SigLIP's loss: a binary decision for every image and text (arXiv 2303.15343)."""

    option = "siglip"
    directions = 1
    takes_bias = (True,)
    model_arguments = {"init_logit_scale": math.log(10), "init_logit_bias": -10}
    """Section 3.2 of the paper."""

    def __init__(self, chunk_size: int | None = None, rank: int = 0, world_size: int = 1) -> None:
        """chunk_size: rows of the logits that are computed at once."""
        self.loss = ChunkedSigLipLoss(chunk_size, rank=rank, world_size=world_size)

    @classmethod
    def create(cls, options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        return cls(options.loss_chunk_size, ranks.rank, ranks.world_size)

    @classmethod
    def rows(cls, options: LossOptions, own: int, gathered: int) -> int:
        return own

    @classmethod
    def bytes_per_logit(cls, precision: Precision) -> int:
        return 6 if precision in ("amp", "amp_bf16") else 12

    @classmethod
    def memory(cls, options: LossOptions, own: int, gathered: int, precision: Precision) -> tuple[float, float]:
        at_once = min(own, options.loss_chunk_size or max(1, LOGITS_AT_ONCE // gathered))
        return cls.bytes_per_logit(precision) * own * gathered, 12 * at_once * own

    @classmethod
    def traffic(cls, options: LossOptions, own_bytes: int, ranks: int, trained_towers: int) -> dict[Collective, float]:
        """Texts are passed around a ring, and their gradients back."""
        return {"send": 2 * own_bytes * (ranks - 1)}


class ChunkedSigLipLoss(SigLipLoss):
    """open_clip's SigLipLoss, whose ranks pass their texts around a ring: a rank has the logits of its images and the
    texts of one rank at a time, and here only a chunk of those."""

    def __init__(self, chunk_size: int | None = None, **ranks: Any) -> None:
        """ranks: open_clip's rank and world_size."""
        super().__init__(**ranks)
        self.chunk_size = chunk_size

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The mean over images of the sum over texts."""

        def loss_of(chunk: slice) -> Tensor:
            logits = self.get_logits(image_features[chunk], text_features, logit_scale, logit_bias)
            labels = -torch.ones_like(logits)
            if not negative_only:
                labels[:, chunk].fill_diagonal_(1)
            return -F.logsigmoid(labels * logits).sum()

        rows, columns = len(image_features), len(text_features)
        return sum_over_chunks(loss_of, rows, columns, self.chunk_size) / rows
