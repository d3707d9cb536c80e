"""The step-0 check: compares an upcycled model with its dense model before training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import checks
from ..clip.hugging_face import is_hugging_face, random_batch
from ..clip.inputs import encoders, random_inputs
from ..clip.towers import towers
from ..moe.evaluation import evaluating_dropless


def step0_difference(
    dense: nn.Module, sparse: nn.Module, images: Tensor | None = None, texts: Tensor | None = None
) -> float:
    """Largest absolute difference between the normalized features of two models, in evaluation mode without dropping.

    For a CoCa, the decoder's normalized logits are compared as well; for a model of transformers, all its outputs.

    Args:
        dense: a dense model.
        sparse: the model that ``upcycle`` made from it. Training modes and configs of both are restored afterwards.
        images: [B, 3, height, width].
        texts: [B, context_length] token ids. If neither images nor texts are given, 8 random inputs of each are used.

    Returns:
        0 up to rounding right after upcycling with normalized gates. Features have length 1.

    Raises:
        TypeError: a model is not one of open_clip, timm or transformers.
    """
    checks.module("dense", dense)
    checks.module("sparse", sparse)
    for model in (dense, sparse):
        towers(model)  # refuses what has none
    if is_hugging_face(dense):
        named = {"pixel_values": images, "input_ids": texts}
        batch = {name: value for name, value in named.items() if value is not None} or random_batch(dense, batch_size=8)
    else:
        if images is None and texts is None:
            images, texts = random_inputs(dense, batch_size=8)
        batch = {name: value for name, value in {"image": images, "text": texts}.items() if value is not None}
    with evaluating_dropless(dense), evaluating_dropless(sparse):
        pairs = zip(_outputs(sparse, batch), _outputs(dense, batch), strict=True)
        differences = [(ours - theirs).abs().max() for ours, theirs in pairs]
    return torch.stack(differences).max().item()  # NaN where any is


def _outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """All outputs of a model, normalized to length 1 along the last axis, on the CPU."""
    first = next(model.parameters())
    batch = {name: value.to(first.device) for name, value in batch.items()}
    if is_hugging_face(model):
        typed = {name: value.to(first.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        outputs: Any = model(**typed)
    else:
        encode = encoders(model)
        outputs = [encode[name](value) for name, value in batch.items()]
        if len(batch) == 2 and hasattr(model, "text_decoder"):
            outputs.append(model(*batch.values())["logits"])
    vectors = (value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.dim() > 0)
    return [F.normalize(value.float(), dim=-1).cpu() for value in vectors if value.is_floating_point()]
