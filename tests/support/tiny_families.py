"""A small model of every supported MLP family, created in milliseconds and without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from timm.layers import GluMlp, SwiGLU
from timm.models import convnext, eva, swin_transformer, swin_transformer_v2, vision_transformer_relpos, vitamin
from timm.models import vision_transformer as vit
from tiny_clip import build, coca_cfg, draw_biases_and_norms  # noqa: F401
from torch import nn

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 16}
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 16}
_SWIN |= {"window_size": 4}
_VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
_TEXT = {"context_length": 10, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}

TIMM: dict[str, Callable[[], nn.Module]] = {
    "Block/Mlp": lambda: vit.VisionTransformer(**_VIT, init_values=0.1),
    "Block/Mlp, normed": lambda: vit.VisionTransformer(**_VIT, scale_mlp_norm=True),
    "Block/SwiGLU": lambda: vit.VisionTransformer(**_VIT, mlp_layer=SwiGLU, act_layer="silu"),
    "Block/GluMlp": lambda: vit.VisionTransformer(**_VIT, mlp_layer=GluMlp, act_layer="gelu"),
    "Block/GeGluMlp": lambda: vit.VisionTransformer(
        **_VIT, mlp_layer=vitamin.GeGluMlp, class_token=False, global_pool="avg"
    ),
    "ResPostBlock/Mlp": lambda: vit.VisionTransformer(**_VIT, block_fn=vit.ResPostBlock, init_values=0.5),
    "EvaBlock/Mlp": lambda: eva.Eva(**_VIT, init_values=0.1),
    "EvaBlock/SwiGLU, normed": lambda: eva.Eva(**_VIT, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "EvaBlock/GluMlp": lambda: eva.Eva(**_VIT, swiglu_mlp=True),
    "EvaBlockPostNorm/Mlp": lambda: eva.Eva(**_VIT, use_post_norm=True),
    "RelPosBlock/Mlp": lambda: vision_transformer_relpos.VisionTransformerRelPos(**_VIT, init_values=0.1),
    "ResPostRelPosBlock/Mlp": lambda: vision_transformer_relpos.VisionTransformerRelPos(
        **_VIT, block_fn=vision_transformer_relpos.ResPostRelPosBlock, init_values=0.5
    ),
    "SwinTransformerBlock/Mlp": lambda: swin_transformer.SwinTransformer(**_SWIN),
    "SwinTransformerV2Block/Mlp": lambda: swin_transformer_v2.SwinTransformerV2(**_SWIN),
    "ConvNeXtBlock/Mlp": lambda: convnext.ConvNeXt(
        depths=(1, 2, 1, 1), dims=(16, 16, 24, 24), num_classes=16, ls_init_value=0.5
    ),
}
"""timm models by the class names of their block and MLP."""


def mt5_config(feed_forward: str) -> transformers.PretrainedConfig:
    return transformers.MT5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj=feed_forward
    )


def bert_config(name: str, activation: str = "gelu") -> transformers.PretrainedConfig:
    return getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=90,
        hidden_act=activation,
    )


HAS_MODERN_TEXT = hasattr(open_clip.transformer, "ModernTextTransformer")
"""Whether this is open_clip 4."""


def modern_text_clip(**text_cfg: object) -> nn.Module:
    """A CLIP with open_clip 4's text tower."""
    torch.manual_seed(0)
    text = {"text_arch": "modern", "pad_id": 0, "eos_id": 2, "mlp_bias": True, **_TEXT, **text_cfg}
    return open_clip.CustomTextCLIP(16, _VISION, text)


def modern_bert_config() -> transformers.PretrainedConfig:
    return transformers.ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )


HUGGING_FACE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "MT5Block/MT5DenseActDense": lambda: mt5_config("relu"),
    "MT5Block/MT5DenseGatedActDense": lambda: mt5_config("gated-gelu"),
    **({"ModernBertEncoderLayer/ModernBertMLP": modern_bert_config} if HAS_MODERN_TEXT else {}),  # open_clip 3 fails
    "BertLayer": lambda: bert_config("Bert"),
    "RobertaLayer": lambda: bert_config("Roberta"),
    "XLMRobertaLayer": lambda: bert_config("XLMRoberta", "gelu_new"),
}
"""Configs of Hugging Face text towers by the class names of their block and MLP."""


def hugging_face_cfg(config: transformers.PretrainedConfig, directory: Path) -> dict:
    """open_clip's ``model_cfg`` of a CLIP with this text tower, whose config is read from ``directory``."""
    config.save_pretrained(directory)
    text = {"hf_model_name": str(directory), "hf_model_pretrained": False, "hf_tokenizer_name": str(directory)}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
    return {"embed_dim": 16, "vision_cfg": dict(_VISION), "text_cfg": text, "custom_text": True}


def timm_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = TIMM[name]() if name in TIMM else timm.create_model(name)
    return draw_biases_and_norms(model)
