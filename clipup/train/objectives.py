"""The trainer's contact with open_clip and open_clip_train: losses, schedules, and how processes find each other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from open_clip_train.distributed import is_using_distributed, world_info_from_env
from torch import Tensor, nn

from .options import TrainOptions

LOGIT_SCALE_MAX = math.log(100)
"""The logit scale is kept between 1 and 100, as in CLIP."""


SIGLIP_INIT = {"init_logit_scale": math.log(10), "init_logit_bias": -10}
"""What a fresh model starts from under the sigmoid loss (arXiv 2303.15343, section 3.2)."""


__all__ = [
    "LOGIT_SCALE_MAX",
    "SIGLIP_INIT",
    "contrastive_loss",
    "features_of",
    "is_using_distributed",
    "world_info_from_env",
]


def contrastive_loss(options: TrainOptions, model: nn.Module, rank: int, world_size: int) -> nn.Module:
    """ClipLoss, DistillClipLoss, MultiPositiveClipLoss or SigLipLoss over the batch of all ranks; for a CoCa its two
    losses.

    DistillClipLoss returns two terms: ClipLoss, and the mean cross-entropy of the similarities (times logit scale) with
    the softmax of the teacher's as targets, images to texts and back, half of each.

    Raises:
        ValueError: an option that a CoCa's loss does not have, or a bias that the loss does not have.
    """
    if isinstance(model, CoCa):
        return _coca_loss(options, model, rank, world_size)
    for field in dataclasses.fields(options):
        if field.name.startswith("coca_") and getattr(options, field.name) != field.default:
            raise ValueError(f"{field.name} has no effect: the model has no decoder, as a CoCa has; leave it out")
    if options.siglip:
        return SigLipLoss(rank=rank, world_size=world_size)
    softmax_loss = MultiPositiveClipLoss if options.multi_positive else ClipLoss
    if options.distill_model is not None:
        softmax_loss = DistillClipLoss
    if softmax_loss is not ClipLoss and getattr(model, "logit_bias", None) is not None:
        name = "multi_positive" if options.multi_positive else "distill_model"
        raise ValueError(
            f"{name} goes with a softmax loss that knows no logit_bias, which this model has; leave {name} out, or "
            "create the model without init_logit_bias"
        )
    return softmax_loss(
        local_loss=options.local_loss,
        gather_with_grad=options.gather_with_grad,
        cache_labels=True,
        rank=rank,
        world_size=world_size,
    )


class SummedCoCaLoss(CoCaLoss):
    """The contrastive and the captioning loss of a CoCa (arXiv 2205.01917, eq. 4), weighted and added."""

    def forward(self, **output: Tensor) -> Tensor:
        """output: image_features, text_features [B, D], logits [B, L, V], labels [B, L], logit_scale."""
        return sum(super().forward(**output))


def _coca_loss(options: TrainOptions, model: CoCa, rank: int, world_size: int) -> nn.Module:
    for name in ("siglip", "multi_positive", "distill_model"):
        if getattr(options, name):
            raise ValueError(f"{name} has no captioning loss, which a CoCa's decoder learns from; leave it out")
    if getattr(model, "logit_bias", None) is not None:
        raise ValueError("a CoCa's contrastive loss has no bias; create the model without init_logit_bias")
    return SummedCoCaLoss(
        caption_loss_weight=options.coca_caption_loss_weight,
        clip_loss_weight=options.coca_contrastive_loss_weight,
        pad_id=model.pad_id,
        local_loss=options.local_loss,
        gather_with_grad=options.gather_with_grad,
        cache_labels=True,
        rank=rank,
        world_size=world_size,
    )


def features_of(output: Any) -> dict[str, Tensor]:
    """A CLIP forward's output by open_clip's names, whether the model returns a dict or a tuple."""
    if isinstance(output, dict):
        return dict(output)
    return dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), output, strict=False))


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
