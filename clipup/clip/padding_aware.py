"""Padding-aware text towers: tokens after the end of a text are excluded from the sparse layers.

Towers that mask their padding themselves: ``clipup.clip.padding_masks``.

In a causal text tower that pools at end-of-text, no token after it affects the features. ``make_padding_aware`` makes
such a tower pass a mask to its sparse layers: True for the tokens up to the pooled one. On the CPU, where text lengths
are known without synchronization, all blocks (also dense ones) compute only up to the end of the longest text.

The tower, its transformer and its sparse blocks change their classes from open_clip's to the subclasses in this module,
whose forwards take the mask as an argument: tower -> transformer -> block -> layer. No module stores the mask, so
concurrent forwards cannot mix them up.

Axis legend: ``B`` texts, ``L`` tokens per text, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    text_global_pool,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe.layer import SparseMoE
from .padding_hugging_face import make_hugging_face_padding_aware
from .padding_masks import can_truncate, make_images_padding_aware, make_modern_text_padding_aware

_END_OF_TEXT_POOLS = ("argmax", "eos")


def make_padding_aware(model: nn.Module, towers: Sequence[str] = ("image", "text")) -> bool:
    """Makes the towers of a sparse or dense model padding-aware, if that does not change their features.

    Parameters and state dict are unchanged; so are the features, unless tokens are dropped. At every forward,
    ``MoEConfig.padding_aware`` of each sparse layer decides whether it excludes the padding; if one layer does not,
    texts are not truncated.

    Args:
        towers: those that are made padding-aware.

    Returns:
        False if the text tower was left unchanged, because it is not causal, does not pool at end-of-text, returns
        token features, or contains a module that is not exactly of one of open_clip's classes.
    """
    if make_hugging_face_padding_aware(model):
        return True
    if "image" in towers:
        make_images_padding_aware(model)
    return "text" in towers and (make_modern_text_padding_aware(model) or _make_text_padding_aware(model))


def _make_text_padding_aware(model: nn.Module) -> bool:
    tower: Any = model if type(model) is open_clip.CLIP else getattr(model, "text", None)
    if type(tower) not in _TOWERS or type(tower.transformer) is not Transformer:
        return False
    if not getattr(tower.transformer, "batch_first", True):  # open_clip 4 has no other order
        return False
    blocks = tower.transformer.resblocks
    if not all(type(block) in _BLOCKS for block in blocks):
        return False
    if not (_returns_end_of_text(tower) and _is_causal(tower.attn_mask)):
        return False
    tower.__class__ = _TOWERS[type(tower)]
    tower.transformer.__class__ = PaddingAwareTransformer
    for block in blocks:
        if isinstance(block.mlp, SparseMoE):
            block.__class__ = _BLOCKS[type(block)]
    return True


def tokens_up_to_pooled(texts: Tensor, pool_type: str, eos_id: int | None) -> Tensor:
    """[B, L] bool, True up to the position that open_clip's pooling selects for texts [B, L] of token ids.

    The position comes from open_clip's own pooling, applied to the positions.
    """
    positions = torch.arange(texts.shape[1], device=texts.device)
    pooled = text_global_pool(positions.expand(texts.shape), texts, pool_type, eos_token_id=eos_id)
    return positions <= pooled[:, None]


class PaddingAwareBlock(ResidualAttentionBlock):
    """A block that passes ``token_mask`` [B, L] to its sparse layer: bool, True for tokens that are not masked."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        if not _takes_mask(self.mlp, token_mask):
            return super().forward(q_x, k_x, v_x, attn_mask)
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x), token_mask))


class PaddingAwareCustomBlock(CustomResidualAttentionBlock):
    """``PaddingAwareBlock`` for open_clip's custom block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        if not _takes_mask(self.mlp, token_mask):
            return super().forward(x, attn_mask)
        x = x + self.ls_1(self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask)))
        return x + self.ls_2(self.mlp(self.ln_2(x), token_mask))


class PaddingAwareTransformer(Transformer):
    """Passes ``token_mask`` [B, L] to the padding-aware blocks, also under activation checkpointing."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        if token_mask is None:
            return super().forward(x, attn_mask)
        for block in self.resblocks:
            masks: dict[str, Any] = {"attn_mask": attn_mask}
            if isinstance(block, PaddingAwareBlock | PaddingAwareCustomBlock):
                masks["token_mask"] = token_mask
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False, **masks)
            else:
                x = block(x, **masks)
        return x


class PaddingAwareCLIP(open_clip.CLIP):
    """open_clip's CLIP, in which the model itself is the text tower."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text: [B, L] token ids -> features [B, embed_dim]."""
        return self._encode_text(text, normalize)

    def _encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """In open_clip 4, what ``forward`` and ``encode_text`` call; open_clip 3 has ``encode_text`` only."""
        if not _returns_end_of_text(self):
            base: Any = super()
            plain = base._encode_text if hasattr(open_clip.CLIP, "_encode_text") else base.encode_text
            return plain(text, normalize)
        x = self.token_embedding(text).to(self.transformer.get_cast_dtype())
        x = x + self.positional_embedding.to(x.dtype)
        features = _encode(self, x, text, self.attn_mask, self.text_pool_type, self.text_eos_id)
        return F.normalize(features, dim=-1) if normalize else features


class PaddingAwareTextTransformer(TextTransformer):
    """The text tower of open_clip's CustomTextCLIP."""

    def forward(self, text: Tensor) -> Tensor:
        """text: [B, L] token ids -> features [B, output_dim]."""
        if not _returns_end_of_text(self):
            return super().forward(text)
        x, attn_mask = self._embeds(text)
        return _encode(self, x, text, attn_mask, self.pool_type, self.eos_id)


_TOWERS = {open_clip.CLIP: PaddingAwareCLIP, TextTransformer: PaddingAwareTextTransformer}
_BLOCKS = {
    ResidualAttentionBlock: PaddingAwareBlock,
    CustomResidualAttentionBlock: PaddingAwareCustomBlock,
}


def _encode(
    tower: PaddingAwareCLIP | PaddingAwareTextTransformer,
    x: Tensor,
    texts: Tensor,
    attn_mask: Tensor,
    pool_type: str,
    eos_id: int | None,
) -> Tensor:
    """Embedded tokens x [B, L, D] of texts [B, L] -> features [B, embed_dim], as in both of open_clip's towers."""
    token_mask = tokens_up_to_pooled(texts, pool_type, eos_id)
    if can_truncate(tower.transformer.resblocks, x):
        longest = int(token_mask.sum(1).max())
        x, texts, token_mask = x[:, :longest], texts[:, :longest], token_mask[:, :longest]
        attn_mask = attn_mask[:longest, :longest]
    x = tower.transformer(x, attn_mask=attn_mask, token_mask=token_mask)
    pooled = text_global_pool(tower.ln_final(x), texts, pool_type, eos_token_id=eos_id)
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _takes_mask(layer: nn.Module, token_mask: Tensor | None) -> bool:
    return token_mask is not None and isinstance(layer, SparseMoE) and layer.config.padding_aware


def _returns_end_of_text(tower: nn.Module) -> bool:
    """Whether the tower is causal and returns only the features of the end-of-text token. Checked at every forward,
    because these attributes can be reassigned."""
    if tower.attn_mask is None:
        return False
    if isinstance(tower, open_clip.CLIP):
        return tower.text_pool_type in _END_OF_TEXT_POOLS
    return tower.pool_type in _END_OF_TEXT_POOLS and tower.cls_emb is None and not tower.output_tokens


def _is_causal(attn_mask: Tensor) -> bool:
    """Whether an additive mask [L, L] hides all later tokens. Meta tensors are assumed to be open_clip's mask."""
    earlier = torch.ones_like(attn_mask, dtype=torch.bool).tril()
    return attn_mask.is_meta or bool((attn_mask.isneginf() | earlier).all())
