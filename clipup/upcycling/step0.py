"""The step-0 check: compares an upcycled model with its dense model before training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..clip.inputs import encoders, random_inputs
from ..moe.evaluation import evaluating_dropless


def step0_difference(
    dense: nn.Module, sparse: nn.Module, images: Tensor | None = None, texts: Tensor | None = None
) -> float:
    """Largest absolute difference between the normalized features of two models, in evaluation mode without dropping.

    For a CoCa, the decoder's normalized logits are compared as well.

    Args:
        dense: a dense model.
        sparse: the model that ``upcycle`` made from it. Training modes and configs of both are restored afterwards.
        images: [B, 3, height, width].
        texts: [B, context_length] token ids. If neither images nor texts are given, 8 random inputs of each are used.

    Returns:
        0 up to rounding right after upcycling with normalized gates. Features have length 1.
    """
    checks.module("dense", dense)
    checks.module("sparse", sparse)
    for name, given in (("images", images), ("texts", texts)):
        if given is not None:
            checks.tensor(name, given)
    if images is None and texts is None:
        images, texts = random_inputs(dense, batch_size=8)
    with evaluating_dropless(dense), evaluating_dropless(sparse):
        pairs = zip(_features(sparse, images, texts), _features(dense, images, texts), strict=True)
        differences = [(ours - theirs).abs().max() for ours, theirs in pairs]
    return torch.stack(differences).max().item()  # NaN where any is


def _features(model: nn.Module, images: Tensor | None, texts: Tensor | None) -> Iterator[Tensor]:
    """All outputs of a model, normalized to length 1 along the last axis, on the CPU."""
    device = next(model.parameters()).device
    encode = encoders(model)
    if images is not None:
        yield F.normalize(encode["image"](images.to(device)).float(), dim=-1).cpu()
    if texts is not None:
        yield F.normalize(encode["text"](texts.to(device)).float(), dim=-1).cpu()
    if images is not None and texts is not None and hasattr(model, "text_decoder"):
        yield F.normalize(model(images.to(device), texts.to(device))["logits"].float(), dim=-1).cpu()
