"""Options of which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...checks import check
from .group import OptionGroup


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
        for name in ("lock_image_unlocked_groups", "lock_text_unlocked_layers"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
