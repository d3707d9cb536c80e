"""Towers of transformers' models: CLIP, SigLIP, SigLIP 2, and the vision and text models ViT, DINOv2, DINOv3, BERT,
RoBERTa, XLM-RoBERTa and ModernBERT, with any head. Their classes are known by name, transformers is not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dense.transformers_models import MODEL_TYPES, PACKAGES, SPARSE_PREFIX, full_name

BLOCKS = {full_name(name, package.block): package.tower for name, package in PACKAGES.items()}
"""The tower of each class of block; None where both towers have it."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__ == "transformers.modeling_utils"
        for base in type(model).__mro__
    )


def hugging_face_blocks(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The blocks by full name, in execution order, of each tower that the model has, "image" before "text".

    Raises:
        TypeError: the model is of another type than ``MODEL_TYPES``, or has no blocks.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "").removeprefix(SPARSE_PREFIX)
    towers: dict[str, dict[str, nn.Module]] = {"image": {}, "text": {}}
    for name, module in model.named_modules() if model_type in MODEL_TYPES else ():
        if (kind := block_class(module)) is not None:
            towers[BLOCKS[kind] or _tower_of(name, model)][name] = module
    towers = {tower: blocks for tower, blocks in towers.items() if blocks}
    if not towers:
        raise TypeError(
            f"cannot read the blocks of a {type(model).__name__}, whose model type is {model_type!r}; model types of "
            f"transformers that are read: {', '.join(MODEL_TYPES)}"
        )
    return towers


def _tower_of(block: str, model: nn.Module) -> str:
    """The tower that a block belongs to: that in the name of the innermost module around it, or of the model."""
    for name in (*reversed(block.split(".")), type(model).__name__):
        for tower, word in {"image": "vision", "text": "text"}.items():
            if word in name.lower():
                return tower
    raise TypeError(f"cannot tell the tower of {block} in a {type(model).__name__}")


def block_class(module: nn.Module) -> str | None:
    """The full name of transformers' class of a block, dense or sparse; None if it is not a known block."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((name for name in names if name in BLOCKS), None)


def random_batch(model: Any, batch_size: int, seed: int = 0) -> dict[str, Tensor]:
    """Random keyword arguments of the model's forward, deterministic for a seed: images and texts without padding."""
    generator = torch.Generator().manual_seed(seed)
    batch, blocks = {}, hugging_face_blocks(model)
    if "text" in blocks:
        config = getattr(model.config, "text_config", model.config)
        length = min(16, getattr(config, "max_position_embeddings", 16) - 2)
        ids = torch.randint(3, config.vocab_size - 1, (batch_size, max(length, 2)), generator=generator)
        ids[:, -1] = getattr(config, "eos_token_id", None) or config.vocab_size - 1
        batch["input_ids"] = ids
    if "image" in blocks:
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None)
        if size is None:  # SigLIP 2 takes patches of images of any size
            side = max(1, int(config.num_patches**0.5))
            width = config.num_channels * config.patch_size**2
            batch["pixel_values"] = torch.randn(batch_size, side * side, width, generator=generator)
            batch["pixel_attention_mask"] = torch.ones(batch_size, side * side, dtype=torch.long)
            batch["spatial_shapes"] = torch.full((batch_size, 2), side)
        else:
            height, width = (size, size) if isinstance(size, int) else size
            batch["pixel_values"] = torch.randn(batch_size, config.num_channels, height, width, generator=generator)
    return batch
