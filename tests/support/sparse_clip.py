"""A tiny sparse CLIP whose experts differ, with its transform and tokenizer, images and captions."""

from __future__ import annotations

import numpy as np
import open_clip
import torch
from PIL import Image
from tiny_clip import tiny_clip, tiny_config
from torch import nn

from clipup import MoEConfig, moe_layers, upcycle

EXPERTS, CHOICES = 4, 2
CAPTIONS = (
    "a cat on a mat",
    "two red balloons",
    "Grüße aus Überlingen!",
    "cat",
    "the cat's unbelievably red hat today",
)


def sparse_config() -> dict:
    """The ``model_cfg`` of the model, with the vocabulary of open_clip's own tokenizer."""
    config = tiny_config()
    config["text_cfg"]["vocab_size"] = 49408
    return config


def dense_clip() -> nn.Module:
    return tiny_clip(text_cfg=sparse_config()["text_cfg"])


def sparse_clip(noise: float = 0.02, **options) -> nn.Module:
    """``dense_clip`` upcycled, with noise added to every expert and more confident routers."""
    config = MoEConfig(**{"num_experts": EXPERTS, "top_k": CHOICES, **options})
    model = upcycle(dense_clip(), config).eval()
    torch.manual_seed(1)
    return randomise_experts(model, noise)


@torch.no_grad()
def randomise_experts(model: nn.Module, noise: float = 0.3) -> nn.Module:
    """Experts that differ, and confident routers."""
    for layer in moe_layers(model).values():
        layer.router.weight.mul_(20)
        for parameter in layer.parameters(recurse=False):
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def transform():
    return open_clip.image_transform(16, is_train=False)


def tokenizer():
    return open_clip.SimpleTokenizer(context_length=10)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Random pictures of 24 x 20 pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]
