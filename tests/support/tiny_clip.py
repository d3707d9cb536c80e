"""Small CLIP models of every kind that can be upcycled, created from configs in milliseconds."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from clipup import save_pretrained

_VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 4}
_TEXT = {"context_length": 10, "vocab_size": 64, "width": 32, "heads": 2, "layers": 4}

CONFIGS = {
    "gelu": {"embed_dim": 16, "vision_cfg": _VISION, "text_cfg": _TEXT},
    "quick_gelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": _VISION, "text_cfg": _TEXT},
    "gelu_tanh": {
        "embed_dim": 16,
        "vision_cfg": {**_VISION, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {**_TEXT, "act_kwargs": {"approximate": "tanh"}},
    },
    "custom_text": {"embed_dim": 16, "custom_text": True, "vision_cfg": _VISION, "text_cfg": _TEXT},
    "custom_blocks": {
        "embed_dim": 16,
        "vision_cfg": {**_VISION, "block_type": "custom", "qk_norm": True, "scale_attn": True, "ls_init_value": 0.1},
        "text_cfg": {**_TEXT, "block_type": "custom", "scale_heads": True},
    },
    "eos_pool": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {**_VISION, "pool_type": "avg"},
        "text_cfg": {**_TEXT, "pool_type": "eos", "eos_id": 2},
    },
    "timm": {
        "embed_dim": 64,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": _TEXT,
    },
}
"""open_clip's ``model_cfg`` of each kind. All except "timm" have 4 blocks per tower."""


def tiny_config(kind: str = "gelu") -> dict:
    return deepcopy(CONFIGS[kind])


def tiny_clip(kind: str = "gelu", seed: int = 0, text_cfg: dict | None = None) -> nn.Module:
    """A float32 model in training mode. All parameters are random, also biases and layer norms.

    Args:
        text_cfg: overrides of the kind's text tower options.
    """
    config = tiny_config(kind)
    config["text_cfg"].update(text_cfg or {})
    return build(config, seed)


def save_with_words(directory: Path) -> tuple[nn.Module, dict]:
    """A model with a vocabulary of three words, and its config; saved with the words red, green and blue."""
    config, words = tiny_config(), {"hf_tokenizer_name": "words:icons", "vocab_size": 7}
    config["text_cfg"] |= words
    model = tiny_clip(text_cfg=words)
    directory.mkdir()
    (directory / "vocabulary.txt").write_text("red\ngreen\nblue\n")
    save_pretrained(model, directory, config, tokenizer_directory=f"local-dir:{directory}")
    return model, config


def coca_cfg(context_length: int = 10) -> dict:
    """open_clip's ``model_cfg`` of a CoCa: image and text towers, and a decoder with 2 layers."""
    text, vision = {**_TEXT, "layers": 2, "context_length": context_length}, {**_VISION, "layers": 2}
    return {
        "embed_dim": 32,
        "vision_cfg": {**vision, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 2},
        "custom_text": True,
    }


def build(cfg: dict, seed: int = 0) -> nn.Module:
    """The model of a ``model_cfg``, in training mode with random parameters."""
    torch.manual_seed(seed)
    cfg = dict(cfg)
    custom = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    model = (custom if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg)
    if custom is open_clip.CoCa:
        nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip does not initialize it
    return draw_biases_and_norms(model)


def draw_biases_and_norms(model: nn.Module) -> nn.Module:
    """Adds noise to biases and norms, which start as zeros or ones and would have no effect in a test."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and "logit" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def contrastive_loss(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    image_features, text_features, scale, *_ = model(images, texts)
    return open_clip.ClipLoss()(image_features, text_features, scale)
