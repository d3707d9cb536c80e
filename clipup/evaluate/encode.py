"""Features of images and texts, a batch at a time, on the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..data.shares import Share
from ..precision import Precision, autocast, image_dtype

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
        model: open_clip's CLIP, dense or sparse; evaluated where its parameters are, its mode is put back afterwards.
        images: preprocessed images [3, height, width], drawn as they are needed; of a shared evaluation, those of this
            process's batches. The features are of all images.
    """
    device, dtype = device_of(model), image_dtype(precision)

    def encode(batch: list[Tensor]) -> Tensor:
        stacked = torch.stack(batch).to(device=device, dtype=dtype, non_blocking=True)
        with autocast(precision, device):
            return model.encode_image(stacked, normalize=True)

    return _encode(model, images, batch_size, encode, share or Share())


def encode_texts(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int = 64,
    precision: Precision = "fp32",
    share: Share | None = None,
) -> Tensor:
    """Normalised text features [N, D]. Equal texts are encoded once. A shared evaluation is given all texts."""
    share = share or Share()
    device = device_of(model)
    distinct = list(dict.fromkeys(texts))

    def encode(batch: list[str]) -> Tensor:
        tokens = tokenizer(batch).to(device)
        with autocast(precision, device):
            return model.encode_text(tokens, normalize=True)

    features = _encode(model, share.part(distinct, batch_size), batch_size, encode, share)
    row_of = {text: row for row, text in enumerate(distinct)}
    return features[torch.tensor([row_of[text] for text in texts], dtype=torch.long)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last of what is left."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode(
    model: nn.Module, items: Iterable[Item], batch_size: int, encode: Callable[[list[Item]], Tensor], share: Share
) -> Tensor:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with evaluating(model):
        mine = [encode(batch).float().cpu() for batch in in_batches(items, batch_size)]
    features = share.join(mine)
    if not features:
        raise ValueError("there is nothing to encode: the data set is empty")
    return torch.cat(features)
