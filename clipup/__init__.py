"""CLIP-UP: turns a dense CLIP into a sparse Mixture-of-Experts CLIP, trains it and evaluates it.

    model, _, preprocess = clipup.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    model = clipup.upcycle(model, clipup.MoEConfig.clip_up())
    loss = contrastive + clipup.aux_loss(model)

``SparseMoE`` is the layer by itself, for any model.
"""

from __future__ import annotations

from typing import Any

from .accelerate import accelerate
from .balancing import update_selection_bias
from .calibration import calibrate
from .checkpoint import save_pretrained
from .config import MoEConfig
from .metrics import moe_metrics
from .moe import SparseMoE, aux_loss, moe_layers
from .upcycle import step0_difference, upcycle
from .weight_decay import parameter_groups

_FROM_MODELS = ("create_model_and_transforms", "get_model_config", "get_tokenizer", "load_checkpoint")
_FROM_TIMM_MODELS = ("create_timm_model",)

__all__ = [
    "MoEConfig",
    "SparseMoE",
    "accelerate",
    "aux_loss",
    "calibrate",
    "create_model_and_transforms",
    "create_timm_model",
    "get_model_config",
    "get_tokenizer",
    "load_checkpoint",
    "moe_layers",
    "moe_metrics",
    "parameter_groups",
    "save_pretrained",
    "step0_difference",
    "upcycle",
    "update_selection_bias",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_MODELS:
        from . import models  # imports open_clip, which takes seconds and which SparseMoE does not need

        return getattr(models, name)
    if name in _FROM_TIMM_MODELS:
        from . import timm_models

        return getattr(timm_models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
