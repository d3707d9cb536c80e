"""open_clip's contrastive losses in chunks of rows, so that no rank has all logits of a global batch in memory.

Axis legend: ``B`` pairs of a rank, ``N`` pairs of all ranks, ``D`` width of the features. A rank's logits are [B, N]:
with 512 pairs on each of 64 ranks 16.8 million, and with 32,768 accumulated pairs on one rank 1.07 billion, four
gigabytes for each direction. In chunks, each chunk's logits are computed in the forward pass, reduced to a sum and
forgotten, and computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss, gather_features
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Logits of a chunk where no size is given: 256 MiB in float32."""


def sum_over_chunks(loss_of: Callable[[slice], Tensor], rows: int, columns: int, chunk_size: int | None) -> Tensor:
    """The sum of a loss over all rows of the logits.

    Args:
        loss_of: the sum over some of the rows. With several chunks it runs again in the backward pass.
        chunk_size: rows of a chunk; None: as many as have ``LOGITS_AT_ONCE`` logits.
    """
    size = chunk_size or max(1, LOGITS_AT_ONCE // max(1, columns))
    if size >= rows:
        return loss_of(slice(0, rows))
    chunks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return torch.stack([checkpoint(loss_of, chunk, use_reentrant=False) for chunk in chunks]).sum()


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
            compared: from the logits of some rows, and the columns of their own pairs, to logits with -inf for pairs
                that a row does not compete with.
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
