"""Options of the model that a run starts from, of what is trained of it, and of the loss.

``clipup.train.objectives`` has a class for each loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ...option_group import OptionGroup


@dataclass(kw_only=True)
class ModelOptions(OptionGroup):
    """The model, its weights, and whether it is made sparse."""

    model: str | None = None
    """A model that open_clip knows, or a directory that clipup saved (dense or sparse)."""
    pretrained: str | None = None
    """Tag or file of open_clip weights for a model known by name, or a directory with weights. None: random weights."""
    moe: bool = False
    """Make the model sparse before training, with the options of MoEConfig below."""
    resume_dense: str | None = None
    """Checkpoint of a dense run (epoch_K.pt, ours or open_clip_train 3's) to start --moe from: its weights, and Adam's
    moments for every expert. Steps and schedule start at zero."""

    force_image_size: int | tuple[int, int] | None = None
    """Side of the images instead of the model's, or height and width. Position embeddings are resized."""
    force_patch_dropout: float | None = None
    """Share of the patches that the image tower leaves out in training, instead of the model's."""
    force_context_length: int | None = None
    """Tokens of a text instead of the model's. Position embeddings are resized."""
    force_quick_gelu: bool = False
    """Use QuickGELU, as OpenAI's weights need."""
    force_custom_text: bool = False
    """Give the text tower a module of its own (CustomTextCLIP)."""

    def model_overrides(self) -> dict[str, Any]:
        """The arguments of open_clip's factory that differ from its defaults."""
        names = (field.name for field in dataclasses.fields(ModelOptions) if field.name.startswith("force_"))
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}


@dataclass(kw_only=True)
class TrainedPartsOptions(OptionGroup):
    """Which parameters are trained; the others are locked. In a locked block of a sparse model the experts, the router
    and its selection bias are locked too."""

    lock_image: bool = False
    """Lock the image tower, as in LiT (arXiv 2111.07991)."""
    lock_image_unlocked_groups: int = 0
    """Leave the last n groups of the image tower unlocked: 1 is the projection, 2 also the last block, and so on."""
    lock_image_freeze_bn_stats: bool = False
    """Freeze the running statistics of batch norms in the locked groups of the image tower."""
    lock_text: bool = False
    """Lock the text tower."""
    lock_text_unlocked_layers: int = 0
    """Leave the last n groups of the text tower unlocked, counted like those of the image tower."""
    lock_text_freeze_layer_norm: bool = False
    """In a locked text tower of Hugging Face, lock the layer norms too, which are trained otherwise. In open_clip's own
    text towers they are always locked."""
    train_only: Literal["all", "routers", "experts", "sparse_layers"] = "all"
    """Train nothing but the routers, the experts (shared ones included) or both; in towers that are not locked."""

    def check(self) -> None:
        self.at_least(0, "lock_image_unlocked_groups", "lock_text_unlocked_layers")


@dataclass(kw_only=True)
class LossOptions(OptionGroup):
    """The loss that is minimized besides the sparse layers' own."""

    distill_model: str | None = None
    """Teacher: a model that open_clip knows, or a directory. Its similarities are a second target (DistillClipLoss). It
    must take the same images and tokens; the dense model that --moe starts from does."""
    distill_pretrained: str | None = None
    """Tag, file of weights, or directory of a model or a finished run, for a teacher known by name."""
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
        self.at_least(0, "coca_caption_loss_weight", "coca_contrastive_loss_weight")
        self.at_least(1, "loss_chunk_size")
        if self.siglip and (self.multi_positive or self.distill_model is not None):
            raise ValueError("siglip is another loss than those of multi_positive and distill_model; leave one out")
