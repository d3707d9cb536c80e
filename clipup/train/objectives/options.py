"""Options of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from ...option_group import OptionGroup, Resumed, option

_SIGLIP = {"with --siglip": lambda group: group.siglip}
_TAUGHT = {"with --distill-model": lambda group: getattr(group, "distill_model", None) is not None}  # not in plans


@dataclass(kw_only=True)
class CoCaLossOptions(OptionGroup):
    """The loss of a CoCa."""

    coca_caption_loss_weight: float = option(2.0, Resumed.FREE, least=0)
    """Weight of the captioning loss, for a CoCa."""
    coca_contrastive_loss_weight: float = option(1.0, Resumed.FREE, least=0)
    """Weight of the contrastive loss, for a CoCa."""


@dataclass(kw_only=True)
class PairLossOptions(OptionGroup):
    """Which contrastive loss is computed, and how several ranks compute it."""

    siglip: bool = option(False, Resumed.IDENTITY)
    """Use the sigmoid loss (SigLIP) instead of the softmax loss (CLIP)."""
    local_loss: bool = option(True, Resumed.FREE, idle=_SIGLIP)
    """With several ranks: every rank computes the logits of its own images and texts only."""
    gather_with_grad: bool = option(True, Resumed.FREE, idle=_SIGLIP)
    """With several ranks: gradients flow through gathered features. With neither this nor local_loss the contrastive
    gradient is 1/ranks of the true one, while the router's losses keep their scale."""
    loss_chunk_size: int | None = option(None, Resumed.FREE, least=1, idle=_TAUGHT)
    """Images (and texts) of a rank whose logits are computed at once, and again in the backward pass, so that memory
    never holds all. None: as many as have 2^26 logits. With a teacher it is all of them."""


@dataclass(kw_only=True)
class LossOptions(PairLossOptions, CoCaLossOptions):
    """The loss that is minimized besides the sparse layers' own."""

    distill_model: str | None = option(None, Resumed.FREE)
    """Teacher: a model that open_clip knows, or a directory. Its similarities are a second target (DistillClipLoss). It
    must take the same images and tokens; the dense model that --moe starts from does."""
    distill_pretrained: str | None = option(
        None, Resumed.FREE, idle={"without --distill-model": lambda group: group.distill_model is None}
    )
    """Tag, file of weights, or directory of a model or a finished run, for a teacher known by name."""
    multi_positive: bool = option(False, Resumed.MEASURED)
    """Do not treat pairs of a batch with equal captions as negatives of each other; on val_data every image of a
    caption counts as a correct answer to it. Not with siglip; a teacher's targets stay as they are."""

    def check(self) -> None:
        super().check()
        if self.siglip and (self.multi_positive or self.distill_model is not None):
            raise ValueError("siglip is another loss than those of multi_positive and distill_model; leave one out")
