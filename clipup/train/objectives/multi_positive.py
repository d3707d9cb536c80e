"""CLIP's loss for data in which captions repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .contrastive import ChunkedClipLoss, ContrastiveObjective
from .objective import FEATURES, Batch


class MultiPositiveObjective(ContrastiveObjective):
    """CLIP's loss in which pairs with equal captions are not negatives of each other (``MultiPositiveClipLoss``)."""

    option = "multi_positive"
    takes_bias = (False,)

    def __init__(self, chunk_size: int | None = None, **gathering: Any) -> None:
        self.loss = MultiPositiveClipLoss(chunk_size, **gathering)

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        return {"captions": self.loss.captions(torch.cat([texts for _, texts in batches]))}

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in FEATURES]
        return {"contrastive": self.loss(*features, output["logit_scale"], targets["captions"])}


class MultiPositiveClipLoss(ChunkedClipLoss):
    """CLIP's loss in which pair i competes only with pairs of other captions:
    ``-log(exp(s_ii) / (exp(s_ii) + sum of exp(s_ij) over captions j unlike i))``, the mean over rows and directions.

    This is the elimination of false negatives (arXiv 2011.11765, section 3.2) for captions with equal tokens; where all
    captions differ it is open_clip's ClipLoss. Targets that are uniform over all equal captions (UniCL, arXiv
    2204.03610) would change nothing: equal texts have equal features, so their rows add up to ClipLoss again.
    """

    def forward(  # type: ignore[override]  # captions instead of a bias
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, captions: Tensor
    ) -> Tensor:
        """image_features, text_features: [B, D], normalized; captions: as ``captions`` returned them."""

        def compared(logits: Tensor, own: Tensor) -> Tensor:
            same = captions[own][:, None] == captions[None, :]
            return logits.float().masked_fill(same.scatter(1, own[:, None], False), -torch.inf)

        return super().forward(image_features, text_features, logit_scale, compared=compared)

    def captions(self, texts: Tensor) -> Tensor:
        """[N]: a number per pair of all ranks, the same for equal texts [B, L]. On a GPU it waits for what runs."""
        if self.world_size > 1:
            of_rank = [torch.empty_like(texts) for _ in range(self.world_size)]
            dist.all_gather(of_rank, texts.contiguous())
            texts = torch.cat(of_rank)
        return texts.unique(dim=0, return_inverse=True)[1]
