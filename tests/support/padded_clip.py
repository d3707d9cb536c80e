"""Sparse CLIPs with different experts and confident routers, so that the features depend on the routing."""

from __future__ import annotations

from typing import Any

from sparse_clip import randomise_experts
from tiny_clip import tiny_clip
from torch import Tensor, nn

from clipup import MoEConfig, SparseMoE, moe_layers, upcycle


def sparse_clip(kind: str = "gelu", **options: Any) -> nn.Module:
    """CLIP-UP with 4 experts in training mode. ``options`` are passed to ``MoEConfig``."""
    model = upcycle(tiny_clip(kind), MoEConfig.clip_up(**{"num_experts": 4, **options}), inplace=True)
    return randomise_experts(model)


def text_tower(model: nn.Module) -> nn.Module:
    return getattr(model, "text", model)


def text_layers(model: nn.Module) -> list[SparseMoE]:
    return [layer for name, layer in moe_layers(model).items() if not name.startswith("visual.")]


def routed_texts(model: nn.Module) -> list[Tensor | None]:
    """The mask [T] in the last forward of each sparse layer of the text tower. None means all tokens."""
    layers = text_layers(model)
    assert layers
    return [layer.state.last_routing.mask for layer in layers]


def set_padding_aware(model: nn.Module, value: bool) -> None:
    for layer in moe_layers(model).values():
        layer.config = layer.config.replace(padding_aware=value)
