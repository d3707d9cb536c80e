"""Attention whose projections hold packed weights, for inference on CPUs; made by ``clipup.accelerate``.

Axis legend: ``B`` sequences, ``L`` tokens per sequence, ``D`` model width, ``h`` heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from clipup_kernels import PackedWeight, grouped_linear
from clipup_kernels.types import PLAIN_LAYOUT

from .. import checks
from .prepared import Prepared, check_width, plain_entries, whole

_LONGEST_PRODUCT = 512
"""Tokens up to which plain products of bfloat16 are faster on a CPU than torch's fused attention: 12.3 to 18.0 ms for
96 heads, 197 tokens and one thread of Zen 4."""
_TRANSFORMERS = {
    "bert": ("BertSelfAttention", "BertSelfOutput"),
    "clip": ("CLIPAttention",),
    "dinov2": ("Dinov2Attention",),
    "dinov3_vit": ("DINOv3ViTAttention",),
    "modernbert": ("ModernBertAttention",),
    "mt5": ("MT5Attention",),
    "roberta": ("RobertaSelfAttention", "RobertaSelfOutput"),
    "siglip": ("SiglipAttention",),
    "siglip2": ("Siglip2Attention",),
    "vit": ("ViTAttention", "ViTSelfAttention", "ViTSelfOutput"),
    "xlm_roberta": ("XLMRobertaSelfAttention", "XLMRobertaSelfOutput"),
}
ATTENTIONS = frozenset(
    [
        "timm.layers.attention.Attention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.vision_transformer.Attention",
        "timm.models.vision_transformer_relpos.RelPosAttention",
        *(f"transformers.models.{m}.modeling_{m}.{name}" for m, names in _TRANSFORMERS.items() for name in names),
    ]
)
"""Full names of attention classes that only call their linear layers, so that ``PreparedLinear`` can replace these.
Others read weights and biases themselves (timm's EvaAttention)."""


class _PreparedProjections(Prepared):
    """Layers whose matrices are linear projections: ``in_weight`` and ``out_weight``, with their biases."""

    def _linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O], the weight [O, I] being that of one expert."""
        if weight.layout == PLAIN_LAYOUT:  # prepared on another CPU, whose kernels this one lacks
            return F.linear(x.to(self.dtype), weight.block, bias)
        weight = PackedWeight._make((weight.block, (1, *weight.shape), *weight[2:]))  # as in Prepared.packed
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
        y = grouped_linear(rows, weight, None if bias is None else bias[None], offsets)
        return y.view(*x.shape[:-1], y.shape[-1])


class PreparedLinear(_PreparedProjections):
    """An ``nn.Linear`` with packed weights."""

    def __init__(self, linear: nn.Linear, quantize: str | None = None) -> None:
        super().__init__()
        if not linear_can_be_prepared(linear):
            raise TypeError(
                f"a {type(linear).__name__} with hooks, buffers or parameters that are not its class's cannot be "
                "prepared; leave it as it is"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        tensors = {"in_weight": linear.weight, "in_bias": linear.bias}
        stored = {"weight": whole("in_weight", linear.weight)}
        if linear.bias is not None:
            stored["bias"] = whole("in_bias", linear.bias)
        self._prepare({name: t for name, t in tensors.items() if t is not None}, stored, quantize)
        self.train(False)

    weight = property(lambda self: self.in_weight)
    bias = property(lambda self: self._buffers.get("in_bias"))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., I] in the type in which the layer was prepared."""
        self._check_type(x)
        check_width("x", x, self.in_features)
        return self._linear(x, self.in_weight, self._buffers.get("in_bias"))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, quantize={self.quantize!r}"


class PreparedAttention(_PreparedProjections):
    """Self-attention by an ``nn.MultiheadAttention`` with packed projections. It returns no attention weights."""

    def __init__(self, attention: Any, quantize: str | None = None) -> None:
        super().__init__()
        if not can_be_prepared(attention):
            raise TypeError(
                f"a {type(attention).__name__} with separate projections, bias_k, add_zero_attn, or hooks, buffers, "
                "parameters or parts that are not its class's cannot be prepared; leave it as it is"
            )
        self.num_heads, self.batch_first = attention.num_heads, getattr(attention, "batch_first", True)
        self.embed_dim = attention.out_proj.in_features
        self.head_dim = self.embed_dim // self.num_heads
        out = attention.out_proj
        tensors = {
            "in_weight": attention.in_proj_weight,
            "in_bias": attention.in_proj_bias,
            "out_weight": out.weight,
            "out_bias": out.bias,
        }
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        stored = {_NAMES[name]: whole(name, tensor) for name, tensor in tensors.items()}
        self._prepare(tensors, stored, quantize)
        self.train(False)

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
        """As ``nn.MultiheadAttention.forward``, with ``key`` and ``value`` the query, and no attention weights.

        Raises:
            NotImplementedError: key or value is another tensor, or attention weights are asked for.
            TypeError, ValueError: a mask of another type or shape, or ``is_causal``, which says what attn_mask is,
                without one.
        """
        if key is not query or value is not query:
            raise NotImplementedError("prepared attention computes self-attention only: key and value must be query")
        if need_weights:
            raise NotImplementedError("prepared attention returns no attention weights; pass need_weights=False")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal, and there is none; pass the mask")
        self._check_type(query)
        if query.dim() not in (2, 3):
            raise ValueError(f"query must be [B, L, {self.embed_dim}], or without B, got {list(query.shape)}")
        check_width("query", query, self.embed_dim)
        x = query if self.batch_first or query.dim() == 2 else query.transpose(0, 1)
        x = x if query.dim() == 3 else x[None]
        mask = _both_masks(attn_mask, key_padding_mask, x, self.num_heads, batched=query.dim() == 3)
        y = self._attention(x, mask)
        y = y if query.dim() == 3 else y[0]
        return (y if self.batch_first or query.dim() == 2 else y.transpose(0, 1)), None

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, D] and an additive mask that broadcasts to [B, h, L, L] -> [B, L, D]."""
        batch, length, width = x.shape
        projected = self._linear(x, self.in_weight, self._buffers.get("in_bias"))
        q, k, v = projected.view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, width)
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
            TypeError, ValueError: a mask of another type or shape.
        """
        if any(other is not None and other is not x for other in (k_x, v_x)):
            raise NotImplementedError("prepared attention computes self-attention only: k_x and v_x must be x or None")
        self._check_type(x)
        if x.dim() != 3:
            raise ValueError(f"x must be [B, L, {self.embed_dim}], got {list(x.shape)}")
        check_width("x", x, self.embed_dim)
        if attn_mask is not None:
            batch, length = x.shape[:2]
            excluded = ~attn_mask if _kind("attn_mask", attn_mask) is torch.bool else attn_mask
            attn_mask = _additive(excluded, x)
            shape = tuple(attn_mask.shape)
            scores = (batch, self.num_heads, length, length)
            flat = (batch * self.num_heads, length, length)
            if shape != flat and not _broadcasts(shape, scores):
                raise ValueError(
                    f"attn_mask must have shape {flat}, or one of 2 or 4 dimensions that broadcasts to {scores}, got "
                    f"{shape}"
                )
            attn_mask = attn_mask.view(scores) if shape == flat else attn_mask
        return self._attention(x, attn_mask)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q, k, v [B, h, L, d] with an additive mask, by whichever of torch's ways is faster here. A query
    that sees nothing gives 0, as in ``scaled_dot_product_attention``; in the fast path of torch's
    ``MultiheadAttention`` it gives NaN. Scores are rounded to q's type, as in that path."""
    batch, heads, length, width = q.shape
    short = statically_known_true(length <= _LONGEST_PRODUCT)  # no guard on the length of a traced program
    if q.dtype != torch.bfloat16 or not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    flat = (batch * heads, length, width)
    scores = torch.bmm((q * width**-0.5).reshape(flat), k.reshape(flat).mT).view(batch, heads, length, length)
    if mask is not None:
        scores += mask
    shares = torch.softmax(scores, -1)
    if mask is not None:
        shares = shares.masked_fill_((mask == float("-inf")).all(-1, keepdim=True), 0)
    return torch.bmm(shares.view(batch * heads, length, length), v.reshape(flat)).view(q.shape)


SELF_ATTENTION_BLOCKS = frozenset(
    [
        "open_clip.transformer.ResidualAttentionBlock",
        "torchvision.models.vision_transformer.EncoderBlock",
    ]
)
"""Full names of block classes whose attention is called as the prepared one can be."""


def prepared_attention(attention: nn.Module, quantize: str | None) -> PreparedAttention:
    """The prepared layer in place of a module of ``ATTENTION_MODULES`` for which ``can_be_prepared`` holds."""
    of_torch = isinstance(attention, nn.MultiheadAttention)
    return (PreparedAttention if of_torch else PreparedOpenClipAttention)(attention, quantize)


ATTENTION_MODULES = frozenset(["torch.nn.modules.activation.MultiheadAttention", "open_clip.transformer.Attention"])
"""Full names of the classes that ``prepared_attention`` takes from ``SELF_ATTENTION_BLOCKS``."""


_OUT_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_OPEN_CLIP_PARTS = {
    **dict.fromkeys(("ln_q", "ln_k", "ln_inner"), nn.Identity),
    **dict.fromkeys(("attn_drop", "out_drop"), nn.Dropout),
    "out_proj": nn.Linear,
}
"""The children of an ``Attention`` of open_clip 4, which it calls."""
_NAMES = {
    "in_weight": "in_proj_weight",
    "in_bias": "in_proj_bias",
    "out_weight": "out_proj.weight",
    "out_bias": "out_proj.bias",
}
"""The parameters of attention by their names in the prepared layer."""


def linear_can_be_prepared(linear: nn.Linear) -> bool:
    """Whether ``PreparedLinear`` computes and stores all that a linear layer does."""
    if type(linear) is not nn.Linear:
        return False
    return plain_entries(linear) == ({"weight"} if linear.bias is None else {"weight", "bias"})


def can_be_prepared(attention: Any) -> bool:
    """Whether ``prepared_attention`` computes and stores all that a module of ``ATTENTION_MODULES`` does."""
    out = attention.out_proj
    if attention.in_proj_weight is None or type(out) not in _OUT_PROJECTIONS:
        return False
    absent = {"in_proj_bias": attention.in_proj_bias is None, "out_proj.bias": out.bias is None}
    if plain_entries(attention) != {name for name in _NAMES.values() if not absent.get(name)}:
        return False
    if isinstance(attention, nn.MultiheadAttention):
        return attention.bias_k is None and not attention.add_zero_attn
    if not getattr(attention, "use_sdpa", False):  # also open_clip 3's class of this name, with other masks
        return False
    parts = {name: type(getattr(attention, name)) for name in _OPEN_CLIP_PARTS}
    return (
        parts == _OPEN_CLIP_PARTS
        and attention.logit_scale is None
        and attention.head_scale is None
        and attention.scale == attention.head_dim**-0.5
    )


def _both_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, x: Tensor, heads: int, batched: bool
) -> Tensor | None:
    """The sum of both masks for x [B, L, D], [B or 1, h or 1, L or 1, L]; in boolean ones, True excludes."""
    batch, length, _ = x.shape
    of_keys = [(batch, length)] if batched else [(length,)]
    total = None
    for name, mask, wanted in (
        ("attn_mask", attn_mask, [(length, length), (batch * heads, length, length)]),
        ("key_padding_mask", key_padding_mask, of_keys),
    ):
        if mask is None:
            continue
        _kind(name, mask)
        if tuple(mask.shape) not in wanted:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, wanted))}, got {tuple(mask.shape)}")
        mask = _additive(mask, x)
        if name == "key_padding_mask":
            mask = mask.view(batch, 1, 1, length)
        elif mask.dim() == 3:
            mask = mask.view(batch, heads, length, length)
        total = mask if total is None else total + mask
    return total


def _kind(name: str, mask: Any) -> torch.dtype:
    """The type of a mask, which is boolean or floating."""
    checks.tensor(name, mask)
    dtype: torch.dtype = mask.dtype
    if dtype is not torch.bool and not dtype.is_floating_point:
        raise TypeError(f"{name} must be boolean, or floating and added to the scores, got {dtype}")
    return dtype


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    """A mask in x's type; in a boolean one, True excludes."""
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(x.dtype)


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a mask of 2 or 4 dimensions broadcasts to the scores' shape."""
    fits = all(one in (1, other) for one, other in zip(reversed(shape), reversed(wanted), strict=False))
    return len(shape) in (2, 4) and fits
