"""Blocks that pass on to their sparse layers which tokens are padding.

A block calls its MLP with the hidden states alone. ``PaddingAwareBlock`` keeps the mask in a variable of the thread:
set when the block's forward begins and reset when it ends, also when activation checkpointing runs it again. A hook in
front of the sparse layer reads it. So all that a block computes is its library's.

Axis legend: ``B`` images or texts, ``L`` tokens of each, ``Q`` queries.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterable
from typing import Any

import open_clip.transformer
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor

from ..dense.transformers_models import SPARSE_PREFIX
from ..moe.layer import SparseMoE
from .hugging_face import BLOCKS, block_class

_PREFIX = "PaddingAware"
_POOLS_LAST = ("siglip_text_model", "siglip2_text_model")
ModernTextBlock: Any = getattr(open_clip.transformer, "ModernTextBlock", object)
"""A class of open_clip 4, which open_clip 3 does not have."""


class _State:
    token_mask: Tensor | None = None


class _ThreadState(threading.local):
    """``state`` per thread: a separate object, because ``torch.compile`` loses assignments to attributes of a subclass
    of ``threading.local``."""

    def __init__(self) -> None:
        self.state = _State()


_threads = _ThreadState()


class PaddingAwareBlock:
    """A block whose forward also takes ``token_mask``, [B, L] bool: True for tokens that are not masked."""

    def forward(self, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        state = _threads.state
        outer_mask, state.token_mask = state.token_mask, token_mask
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state.token_mask = outer_mask


def pass_padding_on(block: Any, to: type) -> bool:
    """Lets a block with sparse layers pass the padding on to them, as the subclass ``to`` of its class. Returns whether
    it has such layers."""
    layers = [layer for layer in block.modules() if isinstance(layer, SparseMoE)]
    for layer in layers:
        block.__class__ = to
        layer.register_forward_pre_hook(_pass_token_mask, with_kwargs=True)
    return bool(layers)


def _pass_token_mask(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook in front of a sparse layer's forward; whatever class the layer has, plain or prepared."""
    mask = _threads.state.token_mask
    if (
        mask is None
        or len(args) > 1
        or "mask" in kwargs
        or not layer.config.padding_aware
        or mask.shape[-1] != args[0].shape[-2]  # with a cache, keys are more than the new tokens, none of them padding
    ):
        return None
    return (*args, mask.expand(args[0].shape[:-1])), kwargs  # by position, as hooks of others see it


def attended_tokens(attn_mask: Any) -> Tensor | None:
    """[B, L] bool, True for the tokens that at least one query attends to; None for masks that are not about tokens.

    Args:
        attn_mask: [B, 1, Q or 1, L], bool (True: attend) or additive (0: attend).
    """
    if not isinstance(attn_mask, Tensor) or attn_mask.dim() != 4 or attn_mask.shape[1] != 1:
        return None
    attended = attn_mask if attn_mask.dtype is torch.bool else attn_mask == 0
    return attended[:, 0].any(1)


def can_truncate(blocks: Iterable[Any], x: Tensor) -> bool:
    """Whether texts x [B, L, ...] can be truncated to the longest text in the batch.

    Not on other devices, where reading the length would synchronize; not under compilation, export or tracing, where
    the length would become a constant (even reading the batch size would fix it); and not if a sparse layer routes
    padding.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or len(x) == 0:
        return False
    layers = (block.mlp for block in blocks)
    return all(layer.config.padding_aware for layer in layers if isinstance(layer, SparseMoE))


class PaddingAwareResidualBlock(PaddingAwareBlock, open_clip.transformer.ResidualAttentionBlock):
    """open_clip's block; its tower makes the mask."""


class PaddingAwareCustomBlock(PaddingAwareBlock, open_clip.transformer.CustomResidualAttentionBlock):
    """open_clip's custom block."""


class _MaskedAttention(PaddingAwareBlock):
    """A block of timm, whose attention masks the padding of images of several sizes."""

    def forward(  # type: ignore[override]  # timm's signature
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        return super().forward(x, *args, attn_mask=attn_mask, token_mask=attended_tokens(attn_mask), **kwargs)


class PaddingAwareTimmBlock(_MaskedAttention, Block):
    """timm's pre-norm block of a NaFlexVit."""


class PaddingAwareEvaBlock(_MaskedAttention, EvaBlock):
    """timm's block with rotary position embedding of a NaFlexVit."""


class PaddingAwareModernTextBlock(PaddingAwareBlock, ModernTextBlock):
    """A block of open_clip 4's text tower. Its attention is causal or gets a bias, never both."""

    def forward(  # type: ignore[override]  # open_clip's signature
        self,
        x: Tensor,
        rope_embed: Tensor | None = None,
        key_bias: Tensor | None = None,
        is_causal: bool = False,
        v_first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        bias = None if is_causal else key_bias
        return super().forward(x, rope_embed, bias, is_causal, v_first, token_mask=attended_tokens(key_bias))


class _TransformersBlock(PaddingAwareBlock):
    """A block of transformers, which gets the mask of its attention, made from the tokenizer's ``attention_mask``."""

    pools_last: bool
    """Whether the features of a text are its last token's, masked or not, as in SigLIP: it is routed."""

    def forward(  # type: ignore[override]  # transformers' signature
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        of_flash = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2  # [B, L]
        mask = attention_mask != 0 if of_flash else attended_tokens(attention_mask)
        if mask is not None and self.pools_last:
            mask = mask | (torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1)
        return super().forward(hidden_states, attention_mask, *args, token_mask=mask, **kwargs)


def make_transformers_padding_aware(model: Any) -> bool:
    """Lets the sparse layers of a transformers model leave out the padding, of texts and of SigLIP 2's images. Returns
    whether it has such layers. To call it again changes nothing."""
    blocks: list[Any] = [block for block in model.modules() if block_class(block)]
    for block in blocks:
        if not isinstance(block, PaddingAwareBlock) and pass_padding_on(
            block, _transformers_block_class(block_class(block))
        ):
            block.chunk_size_feed_forward = 0  # BERT's memory saver: the tokens of a batch are routed together
            config = getattr(getattr(block, "self_attn", None), "config", None)
            block.pools_last = getattr(config, "model_type", "").removeprefix(SPARSE_PREFIX) in _POOLS_LAST
    return any(isinstance(block, PaddingAwareBlock) for block in blocks)


@functools.cache
def _transformers_block_class(full_name: Any) -> type:
    module, name = full_name.rsplit(".", 1)
    block = getattr(importlib.import_module(module), name)
    # transformers, accelerate and FSDP look for blocks by the names of their classes; pickle looks up __qualname__
    return type(name, (_TransformersBlock, block), {"__module__": __name__, "__qualname__": _PREFIX + name})


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    for full_name in BLOCKS:
        if name == _PREFIX + full_name.rsplit(".", 1)[1]:
            return _transformers_block_class(full_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
