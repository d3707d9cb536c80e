"""Attention whose projections hold packed weights, for inference on CPUs; made by ``clipup.accelerate``.

Axis legend: ``B`` sequences, ``L`` tokens per sequence, ``D`` model width, ``h`` heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipup_kernels import self_attention

from ..dense.transformers_models import PACKAGES, full_name
from .calibration import Calibration
from .prepared import Stored, first_of, is_replaceable
from .prepared_linear import PreparedProjections

ATTENTIONS = frozenset(
    [
        "timm.layers.attention.Attention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.EvaAttention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
        "timm.models.vision_transformer.Attention",
        "timm.models.vision_transformer_relpos.RelPosAttention",
        full_name("mt5", "MT5Attention"),
        *(full_name(name, attention) for name, package in PACKAGES.items() for attention in package.attention),
    ]
)
"""Full names of attention classes that only call their linear layers, so that ``PreparedLinear`` can replace these."""


class PreparedAttention(PreparedProjections):
    """Self-attention by an ``nn.MultiheadAttention`` with packed projections. It returns no attention weights."""

    def __init__(self, attention: Any, quantize: str | None = None, source: Calibration | Stored | None = None) -> None:
        super().__init__(attention, quantize, source)
        self.num_heads, self.batch_first = attention.num_heads, getattr(attention, "batch_first", True)

    @staticmethod
    def read(plain: Any) -> Mapping[str, Tensor | None]:
        out = plain.out_proj
        projections = {"in_weight": plain.in_proj_weight, "in_bias": plain.in_proj_bias}
        return {**projections, "out_weight": out.weight, "out_bias": out.bias}

    @staticmethod
    def seen(plain: Any) -> Callable[..., list[dict[str, Tensor]]]:
        unprojected, projection = copy.copy(plain), copy.copy(plain.out_proj)
        weight = plain.out_proj.weight
        nothing = {"weight": torch.eye(weight.shape[-1]).to(weight), "bias": torch.zeros_like(weight[0])}
        projection._parameters = {name: nn.Parameter(value, False) for name, value in nothing.items()}
        unprojected._modules = {**plain._modules, "out_proj": projection}

        def inputs(*args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
            attended = unprojected.forward(*args, **kwargs)  # the layer has a hook by now
            attended = attended if isinstance(attended, Tensor) else attended[0]
            return [{"in_weight": first_of(*args, **kwargs), "out_weight": attended}]

        return inputs

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As ``nn.MultiheadAttention.forward`` of batches, with ``key`` and ``value`` the query, no mask but
        ``attn_mask``, and no attention weights.

        Raises:
            NotImplementedError: anything else is asked for.
        """
        alone = key is query and value is query and key_padding_mask is None and not need_weights
        if not alone or (is_causal and attn_mask is None):  # is_causal says what attn_mask is
            raise NotImplementedError(
                "prepared attention computes self-attention with an attn_mask alone, and returns no attention "
                "weights: key and value must be query, need_weights=False"
            )
        self._check_type(query)
        x = query if self.batch_first else query.transpose(0, 1)
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", x.dtype, False)  # type: ignore[attr-defined]
        y = self._attention(x, mask)
        return (y if self.batch_first else y.transpose(0, 1)), None

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, D] and an additive mask, [B*h, L, L] or one that broadcasts to [B, h, L, L] -> [B, L, D]."""
        batch, length, _ = x.shape
        if mask is not None:
            shape = (batch, self.num_heads) if mask.dim() == 3 else (1,) * (4 - mask.dim()) + mask.shape[:-2]
            mask = mask.float().view(*shape, *mask.shape[-2:]).expand(-1, -1, length, length)
        projected = self._linear(x, self.in_weight, self._buffers.get("in_bias"))
        # Quantized attention looks at the whole sequence, which a mask hides from some of its tokens.
        quantize = self.quantize if mask is None else None
        attended = self_attention(projected, self.num_heads, mask, quantize)
        return self._linear(attended, self.out_weight, self._buffers.get("out_bias"))

    def extra_repr(self) -> str:
        return f"{self.out_weight.shape[-2]}, num_heads={self.num_heads}, quantize={self.quantize!r}"


class PreparedOpenClipAttention(PreparedAttention):
    """The same of the ``Attention`` that open_clip 4 has in its blocks."""

    def forward(  # type: ignore[override]  # that class's signature
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """x: [B, L, D]; attn_mask: additive, or boolean with True for what is seen, [B*h, L, L], or of two or four
        dimensions that broadcast to [B, h, L, L].

        Raises:
            NotImplementedError: k_x or v_x is another tensor.
        """
        if any(other is not None and other is not x for other in (k_x, v_x)):
            raise NotImplementedError("prepared attention computes self-attention only: k_x and v_x must be x or None")
        self._check_type(x)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=x.dtype).masked_fill_(~attn_mask, float("-inf"))
        return self._attention(x, attn_mask)


SELF_ATTENTION_BLOCKS = frozenset(
    [
        "open_clip.transformer.ResidualAttentionBlock",
        "torchvision.models.vision_transformer.EncoderBlock",
    ]
)
"""Full names of block classes whose attention is called as the prepared one can be."""


def attention_class(attention: nn.Module) -> type[PreparedAttention]:
    """The prepared layer for a module of ``ATTENTION_MODULES`` for which ``can_be_prepared`` holds."""
    return PreparedAttention if isinstance(attention, nn.MultiheadAttention) else PreparedOpenClipAttention


ATTENTION_MODULES = frozenset(["torch.nn.modules.activation.MultiheadAttention", "open_clip.transformer.Attention"])
"""Full names of the classes that ``attention_class`` knows, in ``SELF_ATTENTION_BLOCKS``."""


_OUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_OPEN_CLIP_PARTS = {
    **dict.fromkeys(("ln_q", "ln_k", "ln_inner"), nn.Identity),
    **dict.fromkeys(("attn_drop", "out_drop"), nn.Dropout),
    "out_proj": nn.Linear,
}
"""The children of an ``Attention`` of open_clip 4, which it calls."""


def can_be_prepared(attention: Any) -> bool:
    """Whether the prepared layer computes and stores all that a module of ``ATTENTION_MODULES`` does."""
    read = attention.in_proj_weight is not None and type(attention.out_proj) in _OUT_PROJECTIONS
    if not (read and is_replaceable(attention, PreparedAttention.read(attention))):
        return False
    if isinstance(attention, nn.MultiheadAttention):
        return not attention.add_zero_attn
    if not getattr(attention, "use_sdpa", False):  # also open_clip 3's class of this name, with other masks
        return False
    parts = {name: type(getattr(attention, name)) for name in _OPEN_CLIP_PARTS}
    return (
        parts == _OPEN_CLIP_PARTS
        and attention.logit_scale is None
        and attention.head_scale is None
        and attention.scale == attention.head_dim**-0.5
    )
