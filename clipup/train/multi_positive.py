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
    """CLIP's loss in which pair i competes with the pairs of other captions alone:
    ``-log(exp(s_ii) / (exp(s_ii) + sum of exp(s_ij) over captions j unlike i))``, the mean over rows and both ways.

    It is the elimination of false negatives (arXiv 2011.11765, section 3.2) where captions are equal token for token;
    where all differ it is open_clip's ClipLoss. Targets that are uniform over all equal captions (UniCL, arXiv
    2204.03610) would change nothing: equal texts have equal features, so their rows add up to ClipLoss again.
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
        logits = self.get_logits(image_features, text_features, logit_scale)
        own = self.get_ground_truth(image_features.device, len(logits[0]))
        twins = self._twins(texts, own)
        losses = [F.cross_entropy(one.float().masked_fill(twins, -torch.inf), own) for one in logits]
        loss = sum(losses) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _twins(self, texts: Tensor, own: Tensor) -> Tensor:
        """bool [rows of the logits, pairs of all ranks]: other pairs with a row's caption; the same both ways.

        own: [rows], where each row's own pair is.
        """
        everywhere = texts
        if self.world_size > 1:
            of_rank = [torch.empty_like(texts) for _ in range(self.world_size)]
            dist.all_gather(of_rank, texts.contiguous())
            everywhere = torch.cat(of_rank)
        caption = everywhere.unique(dim=0, return_inverse=True)[1]
        same = caption[own][:, None] == caption[None, :]
        return same.scatter(1, own[:, None], False)
