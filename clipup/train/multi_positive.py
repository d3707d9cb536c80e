"""The contrastive loss where several pairs of a batch say the same: equal captions are no negatives of each other.

Short captions repeat ("arrow left" is the name of hundreds of icons), so that under the plain loss a batch asks the
model to tell apart what is the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor


class MultiPositiveClipLoss(ClipLoss):
    """CLIP's loss with every pair of equal captions as a target (UniCL, arXiv 2204.03610, eq. 1-3).

    Image i and text j belong together when the captions i and j are equal, token for token. The target of an image is
    uniform over its texts, that of a text over its images; the loss is the mean of both cross-entropies. Where all
    captions differ it is open_clip's ClipLoss. The target's entropy is part of it: with n equal captions it is at least
    log(n), not 0.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        texts: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """image_features, text_features: [B, D], normalised; texts: [B, L] token ids, row i of pair i."""
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale)
        targets = self._targets(texts)  # shares of 1 need float32, whatever autocast made of the logits
        loss = (F.cross_entropy(per_image.float(), targets) + F.cross_entropy(per_text.float(), targets)) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _targets(self, texts: Tensor) -> Tensor:
        """[rows of the logits, pairs of all ranks]; rows sum to 1. The relation is symmetric, so both ways share it."""
        everywhere = texts
        if self.world_size > 1:
            of_rank = [torch.empty_like(texts) for _ in range(self.world_size)]
            dist.all_gather(of_rank, texts.contiguous())
            everywhere = torch.cat(of_rank)
        caption = everywhere.unique(dim=0, return_inverse=True)[1]
        rows = caption
        if self.world_size > 1 and self.local_loss:
            rows = caption[self.rank * len(texts) : (self.rank + 1) * len(texts)]
        same = (rows[:, None] == caption[None, :]).float()
        return same / same.sum(1, keepdim=True)
