"""Controls of the mechanism: experts that are chosen without a look at the token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipup.moe.config import MoEConfig
from clipup.moe.layer import moe_layers
from clipup.moe.router import Router

_NEVER = -30.0  # a logit


class BlindRouter(Router):
    """Chooses K experts for each of the ``places`` of an image's tokens, with equal gates."""

    def __init__(self, d_model: int, config: MoEConfig, places: int) -> None:
        super().__init__(d_model, config)
        self.places = places

    def choices(self, tokens: int) -> Tensor:
        """Experts [tokens, K], different ones in a row."""
        raise NotImplementedError

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        never = torch.full((len(x), self.config.num_experts), _NEVER, device=x.device)
        return never.scatter(1, self.choices(len(x)).to(x.device), 0.0)


class RandomRouter(BlindRouter):
    """Draws experts anew for every token at each pass, also in evaluation."""

    def choices(self, tokens: int) -> Tensor:
        return torch.rand(tokens, self.config.num_experts).topk(self.config.top_k).indices


class PositionRouter(BlindRouter):
    """Experts by the place of a token in its image (after hash layers, arXiv 2106.04426), each for as many places."""

    def __init__(self, d_model: int, config: MoEConfig, places: int) -> None:
        super().__init__(d_model, config, places)
        turns = torch.arange(places * config.top_k) % config.num_experts
        table = torch.randperm(config.num_experts)[turns].view(places, config.top_k)
        self.register_buffer("table", table, persistent=False)  # made again from the seed

    def choices(self, tokens: int) -> Tensor:
        return self.table.repeat(tokens // self.places, 1)


_ROUTERS = {"random": RandomRouter, "position": PositionRouter}


def replace_routers(tower: nn.Module, choice: str) -> None:
    """Makes every sparse layer of an image tower choose by ``random`` or ``position``, drawn from torch's state."""
    for layer in moe_layers(tower).values():
        layer.router = _ROUTERS[choice](layer.d_model, layer.config, len(tower.positional_embedding))
