"""Linear layers with packed weights, for inference on CPUs; made by ``clipup.accelerate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipup_kernels import PackedWeight, grouped_linear
from clipup_kernels.types import PLAIN_LAYOUT

from ..dense.transformers_models import full_name
from .calibration import Calibration
from .prepared import Prepared, Stored, is_replaceable


class PreparedProjections(Prepared):
    """Layers whose matrices are linear projections: ``in_weight`` and ``out_weight``, with their biases."""

    centred: tuple[str, ...] = ()

    def _linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O], the weight [O, I] being that of one expert."""
        if weight.layout == PLAIN_LAYOUT:  # prepared on another CPU, whose kernels this one lacks
            return F.linear(x.to(self.dtype), weight.block, bias)
        weight = PackedWeight._make((weight.block, (1, *weight.shape), *weight[2:]))  # as in Prepared.packed
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
        y = grouped_linear(rows, weight, None if bias is None else bias[None], offsets)
        return y.view(*x.shape[:-1], y.shape[-1])


class _OneMatrix(PreparedProjections):
    """Layers with the attributes of ``nn.Linear`` and convolutions."""

    weight = property(lambda self: self.in_weight)
    bias = property(lambda self: self._buffers.get("in_bias"))


class PreparedLinear(_OneMatrix):
    """An ``nn.Linear`` with packed weights."""

    def __init__(
        self, linear: nn.Linear, quantize: str | None = None, source: Calibration | Stored | None = None
    ) -> None:
        super().__init__(linear, quantize, source)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def placed(self, parent: Any) -> None:
        if vars(parent).get("qkv_bias_separate") is False and parent.qkv is self:
            parent.qkv_bias_separate = True  # timm's attention then calls the layer instead of reading its weight

    @staticmethod
    def read(plain: nn.Linear) -> Mapping[str, Tensor | None]:
        return {"in_weight": plain.weight, "in_bias": plain.bias}

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., I] in the type in which the layer was prepared."""
        self._check_type(x)
        return self._linear(x, self.in_weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, quantize={self.quantize!r}"


class PreparedPatches(_OneMatrix):
    """The convolution that embeds an image's patches, as a linear layer on them."""

    def __init__(
        self, convolution: nn.Conv2d, quantize: str | None = None, source: Calibration | Stored | None = None
    ) -> None:
        super().__init__(convolution, quantize, source)
        self.kernel_size = self.stride = convolution.kernel_size

    @staticmethod
    def read(plain: nn.Conv2d) -> Mapping[str, Tensor | None]:
        return {"in_weight": plain.weight.flatten(1), "in_bias": plain.bias}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, height, width] in the type in which the layer was prepared -> [B, D, rows, columns]."""
        self._check_type(x)
        height, width = self.kernel_size
        batch, channels = x.shape[:2]
        rows, columns = x.shape[2] // height, x.shape[3] // width
        if not (rows and columns):
            raise RuntimeError(f"x is {list(x.shape)}, smaller than a patch of {height} x {width}")
        whole = x[..., : rows * height, : columns * width]  # a convolution leaves out what is left over
        parts = whole.reshape(batch, channels, rows, height, columns, width)
        patches = parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * height * width)
        return self._linear(patches, self.in_weight, self.bias).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, quantize={self.quantize!r}"


PATCH_EMBEDDINGS = frozenset(
    [
        "open_clip.transformer.VisionTransformer",
        "timm.layers.patch_embed.PatchEmbed",
        full_name("clip", "CLIPVisionEmbeddings"),
    ]
)
"""Full names of classes that only call their convolution."""


def linear_can_be_prepared(linear: nn.Linear) -> bool:
    """Whether ``PreparedLinear`` computes and stores all that a linear layer does."""
    return type(linear) is nn.Linear and is_replaceable(linear, PreparedLinear.read(linear))


def patches_can_be_prepared(convolution: nn.Module) -> bool:
    """Whether ``PreparedPatches`` computes and stores all that a convolution does: patches side by side."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and (convolution.groups, convolution.dilation) == (1, (1, 1))
        and convolution.padding in ((0, 0), "valid")
        and is_replaceable(convolution, PreparedPatches.read(convolution))
    )
