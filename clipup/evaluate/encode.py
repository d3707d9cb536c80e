"""Features of images and texts, computed in batches and returned on the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..clip.inputs import CheckedTokenizer, image_size
from ..moe.evaluation import evaluating
from ..precision import Precision, autocast, image_dtype
from .shares import Share

Item = TypeVar("Item")


def encode_images(
    model: nn.Module,
    images: Iterable[Tensor],
    batch_size: int = 64,
    precision: Precision = "fp32",
    share: Share | None = None,
) -> Tensor:
    """Normalised image features [N, D].

    Args:
        model: open_clip's CLIP, dense or sparse; runs on the device of its parameters.
        images: preprocessed images [3, height, width], consumed lazily. In a distributed evaluation, the images of
            this process's batches; the features of all images are returned.
        batch_size: images in a batch.
        precision: fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights).
        share: this process's share of a distributed evaluation.
    """
    device, dtype = device_of(model), image_dtype(precision)
    clip: Any = model  # nn.Module types what it does not know as Tensor | Module

    def encode(batch: list[Tensor]) -> Tensor:
        stacked = torch.stack(batch).to(device=device, dtype=dtype, non_blocking=True)
        with autocast(precision, device):
            return clip.encode_image(stacked, normalize=True)

    return _encode(model, images, batch_size, encode, share or Share(), lambda: torch.zeros(3, *image_size(model)))


def encode_texts(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int = 64,
    precision: Precision = "fp32",
    share: Share | None = None,
) -> Tensor:
    """Normalised text features [N, D]. Equal texts are encoded once.

    Args:
        model: open_clip's CLIP, dense or sparse; runs on the device of its parameters.
        texts: N texts; every process of a distributed evaluation gets all of them.
        tokenizer: the model's, texts to token ids [B, context_length].
        batch_size: texts in a batch.
        precision: fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights).
        share: this process's share of a distributed evaluation.

    Raises:
        ValueError: the tokenizer gives ids that the model's embedding lacks.
    """
    share = share or Share()
    device, tokenize = device_of(model), CheckedTokenizer(tokenizer, model)
    distinct = list(dict.fromkeys(texts))
    clip: Any = model

    def encode(batch: list[str]) -> Tensor:
        tokens = tokenize(batch).to(device)
        with autocast(precision, device):
            return clip.encode_text(tokens, normalize=True)

    features = _encode(model, share.part(distinct, batch_size), batch_size, encode, share, lambda: "")
    row_of = {text: row for row, text in enumerate(distinct)}
    return features[torch.tensor([row_of[text] for text in texts], dtype=torch.long)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode(
    model: nn.Module,
    items: Iterable[Item],
    batch_size: int,
    encode: Callable[[list[Item]], Tensor],
    share: Share,
    filler: Callable[[], Item],
) -> Tensor:
    """filler: makes an item, as for ``Share.each``."""
    with evaluating(model):
        mine = share.each(in_batches(items, batch_size), lambda batch: encode(batch).float().cpu(), lambda: [filler()])
    joined = share.join(mine)
    if not joined:
        raise ValueError("nothing to encode: the data set is empty")
    return torch.cat(joined)
