"""Options of the loss. ``clipup.train.objectives`` checks them: they select one of its classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...checks import check
from .group import OptionGroup


@dataclass(kw_only=True)
class LossOptions(OptionGroup):
    """The loss that is minimized besides the sparse layers' own."""

    distill_model: str | None = None
    """Teacher: a model that open_clip knows, or a directory. Its similarities are a second target (DistillClipLoss). It
    must take the same images and tokens; the dense model that --moe starts from does."""
    distill_pretrained: str | None = None
    """Tag or file of the teacher's weights, for a model known by name."""
    siglip: bool = False
    """Use the sigmoid loss (SigLIP) instead of the softmax loss (CLIP)."""
    multi_positive: bool = False
    """Do not treat pairs of a batch with equal captions as negatives of each other; on val_data every image of a
    caption counts as a correct answer to it. Not with siglip; a teacher's targets stay as they are."""
    coca_caption_loss_weight: float = 2.0
    """Weight of the captioning loss, for a CoCa."""
    coca_contrastive_loss_weight: float = 1.0
    """Weight of the contrastive loss, for a CoCa."""
    local_loss: bool = True
    """With several ranks: every rank computes the logits of its own images and texts only."""
    gather_with_grad: bool = True
    """With several ranks: gradients flow through gathered features. With neither this nor local_loss the contrastive
    gradient is 1/ranks of the true one, while the router's losses keep their scale."""
    loss_chunk_size: int | None = None
    """Images (and texts) of a rank whose logits are computed at once, and again in the backward pass, so that memory
    never holds all. None: as many as have 2^26 logits. With a teacher it is all of them."""

    def check(self) -> None:
        size = self.loss_chunk_size
        check("loss_chunk_size", size, size is None or size >= 1, "at least 1, or None")
        for name in ("coca_caption_loss_weight", "coca_contrastive_loss_weight"):
            weight = getattr(self, name)
            check(name, weight, math.isfinite(weight) and weight >= 0, "0 or more")
        if self.distill_pretrained is not None and self.distill_model is None:
            raise ValueError(
                f"distill_pretrained={self.distill_pretrained!r} names weights of distill_model, which is missing; "
                "set both or neither"
            )
        losses = [name for name in ("siglip", "multi_positive", "distill_model") if getattr(self, name)]
        if len(losses) > 1 and "siglip" in losses:
            raise ValueError(
                f"{' and '.join(losses)} select different losses, and a run has one; leave all but one out"
            )
