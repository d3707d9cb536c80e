"""Padding-aware text towers: the tokens behind a text's end stay out of the sparse layers, and are not computed.

A causal text tower that pools at end-of-text never lets a token behind it reach the features. ``leave_padding_out``
makes such a tower hand its sparse layers a mask of the tokens that take part, those up to the pooled one. On the CPU,
where lengths are known without waiting, all blocks, dense ones too, stop at the end of the batch's longest text.

To that end the modules on the way change their classes, from open_clip's to subclasses of them here, whose forwards
take the mask as an argument: tower -> transformer -> block -> layer. No module keeps it, so it cannot be another
forward's.

Axis legend: ``B`` texts, ``L`` tokens a text, ``D`` model width.
"""

from __future__ import annotations

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

_END_OF_TEXT_POOLS = ("argmax", "eos")


def leave_padding_out(model: nn.Module) -> bool:
    """Makes the text tower of a model, sparse or dense, padding-aware, if it is one where that changes no feature.

    Parameters, state dict and, without dropping, features stay. ``MoEConfig.padding_aware`` of each sparse layer says
    at every forward whether that layer leaves the padding out; where one does not, no text is cut.

    Returns:
        False, and the model as it was, for a tower that is not causal, does not pool at end-of-text, returns the
        features of its tokens, or has a part that is not exactly of one of open_clip's own classes.
    """
    tower = model if type(model) is open_clip.CLIP else getattr(model, "text", None)
    if type(tower) not in _TOWERS or type(tower.transformer) is not Transformer or not tower.transformer.batch_first:
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
    """[B, L] bool: the positions up to the one that open_clip's pooling takes, which it is asked for itself.

    texts: [B, L] token ids.
    """
    positions = torch.arange(texts.shape[1], device=texts.device)
    pooled = text_global_pool(positions.expand(texts.shape), texts, pool_type, eos_token_id=eos_id)
    return positions <= pooled[:, None]


class PaddingAwareBlock(ResidualAttentionBlock):
    """A block of which the sparse layer takes ``token_mask`` [B, L] bool, True for tokens that take part."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        if not _wanted(self.mlp, token_mask):
            return super().forward(q_x, k_x, v_x, attn_mask)
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x), token_mask))


class PaddingAwareCustomBlock(CustomResidualAttentionBlock):
    """As ``PaddingAwareBlock``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        if not _wanted(self.mlp, token_mask):
            return super().forward(x, attn_mask)
        x = x + self.ls_1(self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask)))
        return x + self.ls_2(self.mlp(self.ln_2(x), token_mask))


class PaddingAwareTransformer(Transformer):
    """Hands ``token_mask`` [B, L] to the blocks that take it. Checkpointing keeps it with a block's other arguments."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        if token_mask is None:
            return super().forward(x, attn_mask)
        for block in self.resblocks:
            masks = {"attn_mask": attn_mask}
            if isinstance(block, PaddingAwareBlock | PaddingAwareCustomBlock):
                masks["token_mask"] = token_mask
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False, **masks)
            else:
                x = block(x, **masks)
        return x


class PaddingAwareCLIP(open_clip.CLIP):
    """open_clip's CLIP, whose text tower is the model itself."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text: [B, L] token ids -> features [B, embed_dim]."""
        if not _returns_end_of_text(self):
            return super().encode_text(text, normalize)
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
    tower: nn.Module, x: Tensor, texts: Tensor, attn_mask: Tensor, pool_type: str, eos_id: int | None
) -> Tensor:
    """Embedded tokens x [B, L, D] of texts [B, L] -> features [B, embed_dim], as both towers of open_clip have it."""
    token_mask = tokens_up_to_pooled(texts, pool_type, eos_id)
    if _cuts_texts(tower, x):
        longest = int(token_mask.sum(1).max())
        x, texts, token_mask = x[:, :longest], texts[:, :longest], token_mask[:, :longest]
        attn_mask = attn_mask[:longest, :longest]
    x = tower.transformer(x, attn_mask=attn_mask, token_mask=token_mask)
    pooled = text_global_pool(tower.ln_final(x), texts, pool_type, eos_token_id=eos_id)
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _cuts_texts(tower: nn.Module, x: Tensor) -> bool:
    """Whether the blocks compute no more tokens than the batch's longest text has. Not where its length would have to
    be waited for (other devices) or would be taken for every batch's (compilation, export, tracing: there even asking
    for the number of texts fixes it), nor where a sparse layer wants the padding."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or len(x) == 0:
        return False
    layers = (block.mlp for block in tower.transformer.resblocks)
    return all(layer.config.padding_aware for layer in layers if isinstance(layer, SparseMoE))


def _wanted(layer: nn.Module, token_mask: Tensor | None) -> bool:
    return token_mask is not None and isinstance(layer, SparseMoE) and layer.config.padding_aware


def _returns_end_of_text(tower: nn.Module) -> bool:
    """Whether the features of the end-of-text token, seen causally, are all that the tower returns. Asked at every
    forward too: these are attributes that can be assigned."""
    if tower.attn_mask is None:
        return False
    if isinstance(tower, open_clip.CLIP):
        return tower.text_pool_type in _END_OF_TEXT_POOLS
    return tower.pool_type in _END_OF_TEXT_POOLS and tower.cls_emb is None and not tower.output_tokens


def _is_causal(attn_mask: Tensor) -> bool:
    """Whether an additive mask [L, L] lets no token see a later one; on the meta device it is taken for open_clip's."""
    earlier = torch.ones_like(attn_mask, dtype=torch.bool).tril()
    return attn_mask.is_meta or bool((attn_mask.isneginf() | earlier).all())
