"""Controls of the mechanism: tokens whose experts depend on no content, so that no expert can remember anything of its
own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipup.moe.config import MoEConfig
from clipup.moe.layer import moe_layers
from clipup.moe.router import Router


class RandomRouter(Router):
    """Experts drawn anew for every token at each pass."""

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.randn(len(x), self.config.num_experts, device=x.device)


class PositionRouter(Router):
    """Experts fixed by the place of a token in its image, as in hash layers (arXiv 2106.04426)."""

    table: Tensor

    def __init__(self, d_model: int, config: MoEConfig, places: int) -> None:
        super().__init__(d_model, config)
        table = torch.randn(places, config.num_experts)
        self.register_buffer("table", table, persistent=False)  # made again from the seed

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.table.repeat(len(x) // len(self.table), 1)


def replace_routers(model: nn.Module, choice: str) -> None:
    """Makes every sparse layer of the image tower choose ``random``ly or by ``position``, drawn from torch's state."""
    places = len(model.visual.positional_embedding)
    for layer in moe_layers(model).values():
        fixed = layer.d_model, layer.config
        layer.router = RandomRouter(*fixed) if choice == "random" else PositionRouter(*fixed, places)
