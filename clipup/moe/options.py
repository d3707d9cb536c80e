"""The option group of sparse layers, for every command that makes a model sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..option_group import OptionGroup, Resumed, option
from .config import MoEConfig

UNUSED = (
    "without --moe, which makes a dense model sparse; a sparse model keeps its own options: change moe_cfg in its "
    "open_clip_config.json"
)
"""Why options of sparse layers have no effect on a model that is not made sparse."""


@dataclass(kw_only=True)
class SparseOptions(OptionGroup):
    """Sparse layers. The defaults are CLIP-UP's recipe; the source of each is in docs/recipe.md."""

    moe_cfg: Annotated[MoEConfig, tyro.conf.arg(name="")] = option(factory=MoEConfig.clip_up, resumed=Resumed.IDENTITY)

    def idle(self) -> dict[str, str]:
        config = self.moe_cfg
        unlimited = config.capacity_factor is None and config.eval_capacity_factor is None
        reasons = {
            "selection_bias_rate": ("without --selection-bias", config.selection_bias == "none"),
            "balance": ("with --balance-weight 0", config.balance_weight == 0),
            "entropy_threshold": ("without --global-entropy-weight", config.global_entropy_weight == 0),
            "priority": ("without --capacity-factor or --eval-capacity-factor", unlimited),
            "padding_aware": ("without the text tower in --towers", "text" not in (config.towers or ("text",))),
        }
        return super().idle() | {name: why for name, (why, holds) in reasons.items() if holds}
