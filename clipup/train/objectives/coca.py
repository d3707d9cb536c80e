"""The loss of a CoCa."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.coca_model import CoCa
from torch import Tensor, nn

from ...precision import Precision
from ..parallel.ranks import Ranks
from .contrastive import ChunkedClipLoss
from .objective import FEATURES, Objective, gathering
from .options import LossOptions


class CoCaObjective(Objective):
    """The contrastive and the captioning loss of a CoCa (arXiv 2205.01917, after eq. 4): open_clip's, with half the
    paper's contrastive loss, and a mean over tokens instead of the sum. The model selects it."""

    takes_bias = (False,)
    per_pair = (*FEATURES, "logits", "labels")
    """The decoder's logits [B, L, V] and the next tokens [B, L] beside the features."""

    def __init__(
        self,
        pad_id: int,
        caption_weight: float,
        contrastive_weight: float,
        chunk_size: int | None = None,
        **gathering: Any,
    ) -> None:
        """pad_id: the token that no loss is computed for. chunk_size: rows of the contrastive logits at once."""
        self.contrastive = ChunkedClipLoss(chunk_size, **gathering)
        self.pad_id, self.caption_weight, self.contrastive_weight = pad_id, caption_weight, contrastive_weight

    @classmethod
    def create(cls, options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        weights = options.coca_caption_loss_weight, options.coca_contrastive_loss_weight
        assert isinstance(model, CoCa)
        return cls(model.pad_id, *weights, options.loss_chunk_size, **gathering(options, ranks))

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """A term of weight 0 is computed too: DDP needs a gradient, if only zero, of every parameter."""
        contrastive = self.contrastive(*(output[name] for name in FEATURES), output["logit_scale"])
        logits, labels = output["logits"].flatten(0, 1), output["labels"].flatten()
        caption = F.cross_entropy(logits, labels, ignore_index=self.pad_id)
        return {"contrastive": self.contrastive_weight * contrastive, "caption": self.caption_weight * caption}
