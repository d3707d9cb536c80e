"""Padding-aware towers: tokens after the end of a text, and the padding of images, are excluded from the sparse layers.

In a causal text tower that pools at end-of-text, no token after it affects the features. ``make_padding_aware`` makes
such a tower pass a mask to its sparse layers: True for the tokens up to the pooled one. On the CPU, where text lengths
are known without synchronization, all blocks (also dense blocks) compute only up to the end of the longest text. timm's
NaFlexVit, open_clip 4's ModernTextTransformer and transformers' models mask their padding in attention, which tells the
blocks what to leave out.

The tower, its transformer and its sparse blocks change their classes from the library's to subclasses, whose forwards
take the mask as an argument: tower -> transformer -> block (``clipup.clip.padding_blocks``). No module stores the mask,
so concurrent forwards cannot mix them up.

Axis legend: ``B`` texts, ``L`` tokens per text, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    text_global_pool,
)
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .hugging_face import is_hugging_face
from .padding_blocks import (
    ModernTextBlock,
    PaddingAwareBlock,
    PaddingAwareCustomBlock,
    PaddingAwareEvaBlock,
    PaddingAwareModernTextBlock,
    PaddingAwareResidualBlock,
    PaddingAwareTimmBlock,
    can_truncate,
    make_transformers_padding_aware,
    pass_padding_on,
)
from .towers import is_timm

_ModernTextTransformer: Any = getattr(open_clip.transformer, "ModernTextTransformer", object)
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
    if is_hugging_face(model):
        return make_transformers_padding_aware(model)
    if "image" in towers:
        _make_images_padding_aware(model)
    return "text" in towers and (_make_modern_text_padding_aware(model) or _make_text_padding_aware(model))


def _make_images_padding_aware(model: nn.Module) -> None:
    """A NaFlexVit, by itself or as the image tower of a CLIP."""
    tower: Any = model if is_timm(model) else getattr(model, "visual", None)
    trunk = tower.trunk if isinstance(tower, TimmModel) else tower
    if type(trunk) is NaFlexVit:
        for block in trunk.blocks:
            if type(block) in _TIMM_BLOCKS:
                pass_padding_on(block, _TIMM_BLOCKS[type(block)])


def _make_modern_text_padding_aware(model: nn.Module) -> bool:
    tower: Any = getattr(model, "text", None)
    if type(tower) is not _ModernTextTransformer or not all(type(block) is ModernTextBlock for block in tower.blocks):
        return False
    tower.__class__ = PaddingAwareModernTextTransformer
    for block in tower.blocks:
        pass_padding_on(block, PaddingAwareModernTextBlock)
        block.__class__ = PaddingAwareModernTextBlock  # also dense blocks, which get the bias too
    return True


def _make_text_padding_aware(model: nn.Module) -> bool:
    tower: Any = model if type(model) is open_clip.CLIP else getattr(model, "text", None)
    if type(tower) not in _TOWERS or type(tower.transformer) is not Transformer:
        return False
    blocks, batch_first = tower.transformer.resblocks, getattr(tower.transformer, "batch_first", True)  # in open_clip 3
    known = batch_first and all(type(block) in _BLOCKS for block in blocks)
    if not (known and _returns_end_of_text(tower) and _is_causal(tower.attn_mask)):
        return False
    tower.__class__ = _TOWERS[type(tower)]
    tower.transformer.__class__ = PaddingAwareTransformer
    for block in blocks:
        pass_padding_on(block, _BLOCKS[type(block)])
    return True


def tokens_up_to_pooled(texts: Tensor, pool_type: str, eos_id: int | None) -> Tensor:
    """[B, L] bool, True up to the position that open_clip's pooling selects for texts [B, L] of token ids.

    The position comes from open_clip's own pooling, applied to the positions.
    """
    positions = torch.arange(texts.shape[1], device=texts.device)
    pooled = text_global_pool(positions.expand(texts.shape), texts, pool_type, eos_token_id=eos_id)
    return positions <= pooled[:, None]


def text_mask(model: nn.Module, texts: Tensor) -> Tensor | None:
    """[B, L] bool, False for the padding of texts [B, L] of token ids in a model of open_clip that was made
    padding-aware; None where padding is text to the tower, or what is padding is not known."""
    tower: Any = getattr(model, "text", model)
    if isinstance(tower, PaddingAwareCLIP):
        return tokens_up_to_pooled(texts, tower.text_pool_type, tower.text_eos_id)
    if isinstance(tower, PaddingAwareTextTransformer):
        return tokens_up_to_pooled(texts, tower.pool_type, tower.eos_id)
    if isinstance(tower, PaddingAwareModernTextTransformer):
        return tower._valid_mask(texts)
    return texts != tower.config.pad_token_id if isinstance(tower, HFTextEncoder) else None


class PaddingAwareTransformer(Transformer):
    """Passes ``token_mask`` [B, L] to the padding-aware blocks, also under activation checkpointing."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        if token_mask is None:
            return super().forward(x, attn_mask)
        for block in self.resblocks:
            masks: dict[str, Any] = {"attn_mask": attn_mask}
            if isinstance(block, PaddingAwareBlock):
                masks["token_mask"] = token_mask
            x = checkpoint(block, x, use_reentrant=False, **masks) if self.grad_checkpointing else block(x, **masks)
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


_TOWERS = {open_clip.CLIP: PaddingAwareCLIP, TextTransformer: PaddingAwareTextTransformer}
_BLOCKS = {
    ResidualAttentionBlock: PaddingAwareResidualBlock,
    CustomResidualAttentionBlock: PaddingAwareCustomBlock,
}
_TIMM_BLOCKS = {Block: PaddingAwareTimmBlock, EvaBlock: PaddingAwareEvaBlock}


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
