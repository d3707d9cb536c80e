"""A small model of every family of transformers that can be upcycled, created in milliseconds and without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny_clip import draw_biases_and_norms

_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 8}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VISION = {**_SIZE, **_IMAGE}
_WORDS = {**_SIZE, **_TEXT}
_BERT = {**_WORDS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PATCHES = {**_SIZE, "patch_size": 4, "num_patches": 16}


def _clip(config: str) -> Any:
    both = {"text_config": dict(_WORDS), "vision_config": dict(_VISION)}
    if "Siglip2" in config:
        both = {"text_config": {**_WORDS, "projection_size": 32}, "vision_config": dict(_PATCHES)}
    elif "Siglip" in config:
        both["text_config"]["projection_size"] = 32
    return getattr(transformers, config)(**both)


CONFIGS: dict[str, Callable[[], Any]] = {
    "CLIPModel": lambda: _clip("CLIPConfig"),
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**_VISION),
    "CLIPTextModel": lambda: transformers.CLIPTextConfig(**_WORDS),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextConfig(**_WORDS, projection_dim=16),
    "SiglipModel": lambda: _clip("SiglipConfig"),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**_VISION),
    "SiglipTextModel": lambda: transformers.SiglipTextConfig(**_WORDS, projection_size=32),
    "Siglip2Model": lambda: _clip("Siglip2Config"),
    "ViTModel": lambda: transformers.ViTConfig(**_VISION),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**_VISION, num_labels=3),
    "Dinov2Model": lambda: transformers.Dinov2Config(**_VISION, mlp_ratio=2),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(
        **_VISION, mlp_ratio=2, use_swiglu_ffn=True, num_labels=3
    ),
    "DINOv3ViTModel": lambda: transformers.DINOv3ViTConfig(**_VISION, mlp_bias=True),
    "DINOv3ViTModel, gated": lambda: transformers.DINOv3ViTConfig(**_VISION, mlp_bias=True, use_gated_mlp=True),
    "BertModel": lambda: transformers.BertConfig(**_BERT),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**_BERT, num_labels=3),
    "RobertaModel": lambda: transformers.RobertaConfig(**_BERT),
    "RobertaForSequenceClassification": lambda: transformers.RobertaConfig(**_BERT, num_labels=3),
    "XLMRobertaModel": lambda: transformers.XLMRobertaConfig(**_BERT),
    "ModernBertModel": lambda: transformers.ModernBertConfig(**_WORDS, cls_token_id=1, sep_token_id=2),
}
"""The config of each model."""


def tiny_hugging_face(name: str, seed: int = 0) -> Any:
    """A float32 model without dropout, in evaluation mode; all parameters are random, also biases and norms."""
    torch.manual_seed(seed)
    return draw_biases_and_norms(getattr(transformers, name.split(",")[0])(CONFIGS[name]()).eval())
