"""What a plan needs to know of a model: its structure, its activations and its FLOPs, each computed once."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

from torch import Tensor, nn

from ..clip import flops
from ..clip.inputs import image_size, text_length
from ..clip.towers import tower_blocks, towers
from ..models import factory
from ..moe.config import MoEConfig
from ..moe.layer import moe_layers
from ..precision import Precision
from ..train.objectives.sigmoid import SigmoidObjective
from ..train.train_options import TrainOptions
from ..upcycling.upcycle import upcycle
from .activations import Activations, activations
from .units import Unit, has_half_units, units


class Subject:
    """A CLIP on the meta device for which a run is planned."""

    def __init__(self, model: nn.Module, precision: Precision = "amp_bf16") -> None:
        """
        Raises:
            ValueError: not a model with an image and a text tower alone.
        """
        if towers(model) != ("image", "text"):
            raise ValueError(
                f"a {type(model).__name__} has towers {towers(model)}; a plan is for models with an image and a text "
                "tower, whose only loss compares their features"
            )
        for tower in ("image", "text"):
            try:
                tower_blocks(model, tower)
            except TypeError as error:
                raise ValueError(f"the {tower} tower has no transformer blocks, which a plan needs") from error
        self.model = model
        self.precision = precision
        self._units: dict[tuple[bool, int, int, int], list[Unit]] = {}
        self._activations = cache(lambda half: activations(model, precision, blocks_in_half=half))

    @classmethod
    def create(
        cls, name: str, moe: MoEConfig | None = None, precision: Precision = "amp_bf16", siglip: bool = False
    ) -> Subject:
        """The model of an open_clip name or a directory, made sparse if ``moe`` is given. No weights are read."""
        arguments: dict[str, Any] = SigmoidObjective.model_arguments if siglip else {}
        model = factory.create_on_meta(name, precision=precision, **arguments)
        return cls(model if moe is None else upcycle(model, moe, inplace=True), precision)

    def activations(self, options: TrainOptions) -> Activations:
        """On CUDA; counted once for each type in which blocks are gathered."""
        return self._activations(has_half_units(options, self.precision))

    def feature(self, options: TrainOptions) -> Tensor:
        """The feature of one image or text, without memory."""
        return self.activations(options).features["image"][0]

    def trained_towers(self, options: TrainOptions) -> list[str]:
        """Those whose features have a gradient."""
        features = self.activations(options).features
        return [tower for tower in features if features[tower].requires_grad]

    @cached_property
    def counts(self) -> flops.TowerCounts:
        """FLOPs of one image and one text forward, and parameters."""
        return flops.count(self.model)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of one image and one text on the device."""
        height, width = image_size(self.model)
        return 3 * height * width * (2 if self.precision == "bf16" else 4) + 8 * text_length(self.model)

    @cached_property
    def sparse(self) -> dict[str, MoEConfig]:
        """The configs of the sparse layers by name."""
        return {name: layer.config for name, layer in moe_layers(self.model).items()}

    def units(self, options: TrainOptions, gpus: int) -> list[Unit]:
        """``units.units`` of the model, once for each way to spread it."""
        key = (options.parallel.fsdp, options.parallel.fsdp_replicas, options.parallel.ep, gpus)
        if key not in self._units:
            self._units[key] = units(self.model, options, gpus, self.precision)
        return self._units[key]
