"""Padding-aware towers that know their padding from a mask: timm's NaFlexVit, and open_clip 4's ModernTextTransformer.

Both mask the padding of a batch, images of several sizes or texts of several lengths, in attention and pooling, so that
it does not affect the features. Their sparse layers should not see it either: it would take capacity from other tokens
and count in losses and metrics. The blocks of such a tower change their classes to the subclasses in this module, which
read from the attention's mask which tokens are padding. No module stores anything.

Axis legend: ``B`` images or texts, ``L`` tokens of each, ``Q`` queries, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import open_clip.transformer
import torch
from open_clip.timm_model import TimmModel
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..moe.layer import SparseMoE
from .towers import is_timm

_ModernTextBlock: Any = getattr(open_clip.transformer, "ModernTextBlock", object)
_ModernTextTransformer: Any = getattr(open_clip.transformer, "ModernTextTransformer", object)
"""Classes of open_clip 4, which open_clip 3 does not have."""


def make_images_padding_aware(model: nn.Module) -> bool:
    """Lets the sparse layers of a NaFlexVit, by itself or as the image tower of a CLIP, leave the padding out.

    Returns:
        False if the model was left unchanged: it has no such tower, or one with blocks of another class.
    """
    tower: Any = model if is_timm(model) else getattr(model, "visual", None)
    trunk = tower.trunk if isinstance(tower, TimmModel) else tower
    if type(trunk) is not NaFlexVit or not all(type(block) in _TIMM_BLOCKS for block in trunk.blocks):
        return False
    for block in trunk.blocks:
        if isinstance(block.mlp, SparseMoE):
            block.__class__ = _TIMM_BLOCKS[type(block)]
    return True


def make_modern_text_padding_aware(model: nn.Module) -> bool:
    """The same for open_clip 4's ``ModernTextTransformer``; on the CPU it also computes only up to the end of the
    longest text of a batch."""
    tower: Any = getattr(model, "text", None)
    if type(tower) is not _ModernTextTransformer or not all(type(block) is _ModernTextBlock for block in tower.blocks):
        return False
    tower.__class__ = PaddingAwareModernTextTransformer
    for block in tower.blocks:
        block.__class__ = PaddingAwareModernTextBlock
    return True


def attended_tokens(attn_mask: Tensor | None) -> Tensor | None:
    """[B, L] bool, True for the tokens that at least one query attends to.

    Args:
        attn_mask: [B, 1, Q or 1, L], bool (True: attend) or additive (0: attend); None: no mask.
    """
    if attn_mask is None or attn_mask.dim() != 4 or attn_mask.shape[1] != 1:
        return None
    attended = attn_mask if attn_mask.dtype is torch.bool else attn_mask == 0
    return attended[:, 0].any(1)


def can_truncate(blocks: Iterable[Any], x: Tensor) -> bool:
    """Whether texts x [B, L, ...] can be truncated to the longest one in the batch.

    Not on other devices, where reading the length would synchronize; not under compilation, export or tracing, where
    the length would become a constant (even reading the batch size would fix it); and not if a sparse layer routes
    padding.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or len(x) == 0:
        return False
    layers = (block.mlp for block in blocks)
    return all(layer.config.padding_aware for layer in layers if isinstance(layer, SparseMoE))


def _mlp(layer: nn.Module, x: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is not None and isinstance(layer, SparseMoE) and layer.config.padding_aware:
        return layer(x, token_mask.expand(x.shape[:2]))
    return layer(x)


class PaddingAwareTimmBlock(Block):
    """timm's pre-norm block of a NaFlexVit with a sparse layer."""

    def forward(  # type: ignore[override]  # timm's versions differ in the options
        self, x: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, **options)))
        return x + self.drop_path2(self.ls2(_mlp(self.mlp, self.norm2(x), attended_tokens(attn_mask))))


class PaddingAwareEvaBlock(EvaBlock):
    """timm's block with rotary position embedding, of a NaFlexVit with a sparse layer."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        attention = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, **options)
        x = x + self.drop_path1(attention if self.gamma_1 is None else self.gamma_1 * attention)
        y = _mlp(self.mlp, self.norm2(x), attended_tokens(attn_mask))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


_TIMM_BLOCKS = {Block: PaddingAwareTimmBlock, EvaBlock: PaddingAwareEvaBlock}


class PaddingAwareModernTextTransformer(_ModernTextTransformer):
    """A tower whose blocks get the mask of the padding from ``key_bias`` also where attention is causal and needs
    none."""

    def forward(self, text: Tensor) -> Any:
        """text: [B, L] token ids -> features [B, output_dim], and token features where the tower returns them."""
        if can_truncate(self.blocks, text) and not self.cfg.output_tokens:
            positions = torch.arange(1, text.shape[1] + 1, device=text.device)
            text = text[:, : int((self._valid_mask(text) * positions).max())]
        return super().forward(text)

    def _attn_inputs(self, text: Tensor, dtype: torch.dtype, num_prefix: int = 0) -> tuple[bool, Tensor, Tensor]:
        is_causal, key_bias, valid = super()._attn_inputs(text, dtype, num_prefix)
        if key_bias is None:
            bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
            bias = bias.masked_fill(~valid, torch.finfo(dtype).min)
            key_bias = nn.functional.pad(bias, (num_prefix, 0))[:, None, None, :]
        return is_causal, key_bias, valid


class PaddingAwareModernTextBlock(_ModernTextBlock):
    """A block of that tower, dense or sparse. Its attention is causal or gets a bias, never both."""

    def forward(
        self,
        x: Tensor,
        rope_embed: Tensor | None = None,
        key_bias: Tensor | None = None,
        is_causal: bool = False,
        v_first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        bias = None if is_causal else key_bias
        attention, v_first = self.attn(
            self.norm1(x), rope_embed=rope_embed, key_bias=bias, is_causal=is_causal, v_first=v_first
        )
        x = x + self.ls1(self.norm1_post(attention))
        y = _mlp(self.mlp, self.norm2(x), attended_tokens(key_bias))
        return x + self.ls2(self.norm2_post(y)), v_first
