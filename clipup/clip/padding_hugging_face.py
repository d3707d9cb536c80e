"""Padding-aware blocks of transformers' towers: sparse layers leave out what the attention mask masks.

transformers passes a block the mask of its attention, made from the tokenizer's ``attention_mask``, and the block calls
its MLP with the hidden states alone. In between, ``PaddingAwareBlock`` keeps the mask in a variable of the thread:
set when the block's forward begins and reset when it ends, also when activation checkpointing runs it again.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.layer import SparseMoE
from .hugging_face import BLOCKS, block_class, is_hugging_face
from .hugging_face_types import SPARSE_PREFIX
from .padding_masks import attended_tokens

_PREFIX = "PaddingAware"
_POOLS_LAST = ("siglip_text_model", "siglip2_text_model")


class _State:
    token_mask: Tensor | None = None


class _OfThread(threading.local):
    """``state`` per thread: a separate object, because ``torch.compile`` loses assignments to attributes of a subclass
    of ``threading.local``."""

    def __init__(self) -> None:
        self.state = _State()


_threads = _OfThread()


def make_hugging_face_padding_aware(model: nn.Module) -> bool:
    """Lets the sparse layers of a transformers model leave out the padding, of texts and of SigLIP 2's images. Returns
    whether it has such layers. To call it again changes nothing."""
    blocks: list[Any] = [block for block in model.modules() if block_class(block)] if is_hugging_face(model) else []
    found = {block: [layer for layer in block.children() if isinstance(layer, SparseMoE)] for block in blocks}
    for block, layers in found.items():
        if layers and not isinstance(block, PaddingAwareBlock):
            block.__class__ = _padding_aware(block_class(block))
            block.chunk_size_feed_forward = 0  # BERT's memory saver: the tokens of a batch are routed together
            for layer in layers:
                layer.register_forward_pre_hook(_pass_token_mask, with_kwargs=True)
            config = getattr(getattr(block, "self_attn", None), "config", None)
            block.pools_last = getattr(config, "model_type", "").removeprefix(SPARSE_PREFIX) in _POOLS_LAST
    return any(found.values())


def _pass_token_mask(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook in front of a sparse layer's forward; whatever class the layer has, plain or prepared."""
    mask = _threads.state.token_mask
    if mask is None or len(args) > 1 or "mask" in kwargs or not layer.config.padding_aware:
        return None
    return args, {**kwargs, "mask": mask}


class PaddingAwareBlock:
    """A block of transformers with a sparse layer."""

    pools_last: bool
    """Whether the features of a text are its last token's, masked or not, as in SigLIP: it is routed."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = _threads.state
        mask = _token_mask(attention_mask)
        if mask is not None and mask.shape[1] != hidden_states.shape[1]:
            mask = None  # with a cache, keys are more than the new tokens, which are none of the padding
        elif mask is not None and self.pools_last:
            mask = mask | (torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1)
        before, state.token_mask = state.token_mask, mask
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        finally:
            state.token_mask = before


def _token_mask(attention_mask: Any) -> Tensor | None:
    """[B, L] bool, from [B, L] of flash attention or [B, 1, Q, L]; None for what tells nothing about tokens."""
    if not isinstance(attention_mask, Tensor):
        return None
    return attention_mask != 0 if attention_mask.dim() == 2 else attended_tokens(attention_mask)


@functools.cache
def _padding_aware(full_name: Any) -> type:
    module, name = full_name.rsplit(".", 1)
    block = getattr(importlib.import_module(module), name)
    return type(_PREFIX + name, (PaddingAwareBlock, block), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    for full_name in BLOCKS:
        if name == _PREFIX + full_name.rsplit(".", 1)[1]:
            return _padding_aware(full_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
