"""What a plan needs to know of a model: its structure, its activations and its FLOPs, each computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from ..clip import flops
from ..clip.inputs import image_size, text_length
from ..clip.towers import is_timm
from ..moe.config import MoEConfig
from ..moe.layer import moe_layers
from ..precision import Precision
from ..pretrained import factory
from ..train.objectives import SigmoidObjective
from ..upcycling.upcycle import upcycle
from .activations import Activations, activations, bytes_per_logit


class Subject:
    """A CLIP on the meta device, which is planned for."""

    def __init__(self, model: nn.Module, precision: Precision = "amp_bf16") -> None:
        """
        Raises:
            ValueError: not a model with an image and a text tower.
        """
        if is_timm(model):
            raise ValueError(f"{type(model).__name__} has no text tower; clipup plan needs a model that takes pairs")
        self.model = model
        self.precision = precision

    @classmethod
    def create(
        cls, name: str, moe: MoEConfig | None = None, precision: Precision = "amp_bf16", siglip: bool = False
    ) -> Subject:
        """The model of an open_clip name or a directory, made sparse if ``moe`` is given. No weights are read."""
        arguments: dict[str, Any] = SigmoidObjective.model_arguments if siglip else {}
        model = factory.create_on_meta(name, precision=precision, **arguments)
        return cls(model if moe is None else upcycle(model, moe, inplace=True), precision)

    @cached_property
    def activations(self) -> Activations:
        """On CUDA."""
        return activations(self.model, self.precision)

    @cached_property
    def per_logit(self) -> dict[bool, float]:
        """Saved bytes per logit of the softmax loss (False) and of the sigmoid loss (True)."""
        return {siglip: bytes_per_logit(siglip, self.precision) for siglip in (False, True)}

    @cached_property
    def counts(self) -> flops.TowerCounts:
        """FLOPs of one image and one text forward, and parameters."""
        return flops.count(self.model)

    @cached_property
    def input_bytes(self) -> int:
        """Of one image and one text on the device."""
        height, width = image_size(self.model)
        return 3 * height * width * (2 if self.precision == "bf16" else 4) + 8 * text_length(self.model)

    @property
    def experts(self) -> int:
        """Of a sparse layer; 0 for a dense model."""
        return max((layer.config.num_experts for layer in moe_layers(self.model).values()), default=0)
