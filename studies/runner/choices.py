"""Controls of the mechanism: experts that are chosen without a look at the token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipup.moe.config import MoEConfig
from clipup.moe.layer import moe_layers
from clipup.moe.router import Router

_NEVER = -30.0  # a logit


class BlindRouter(Router):
    """Chooses experts with equal gates: by the place of a token in its image, each for as many places (after hash
    layers, arXiv 2106.04426), or without ``places`` anew for every token at each pass, also in evaluation."""

    def __init__(self, d_model: int, config: MoEConfig, places: int | None) -> None:
        super().__init__(d_model, config)
        self.table: Tensor | None = None
        if places is not None:
            turns = torch.arange(places * config.top_k) % config.num_experts
            self.table = torch.randperm(config.num_experts)[turns].view(places, config.top_k)

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        config, table = self.config, self.table
        if table is None:
            chosen = torch.rand(len(x), config.num_experts).topk(config.top_k).indices
        else:
            chosen = table.repeat(len(x) // len(table), 1)
        return torch.full((len(x), config.num_experts), _NEVER).scatter(1, chosen, 0.0).to(x.device)


def replace_routers(tower: nn.Module, choice: str) -> None:
    """Makes every sparse layer of an image tower choose by ``random`` or ``position``, drawn from torch's state."""
    places = {"random": None, "position": len(tower.positional_embedding)}[choice]
    for layer in moe_layers(tower).values():
        layer.router = BlindRouter(layer.d_model, layer.config, places)
