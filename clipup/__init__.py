"""CLIP-UP: turns a dense CLIP into a sparse Mixture-of-Experts (MoE) CLIP, trains it and evaluates it.

    model, _, preprocess = clipup.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    model = clipup.upcycle(model, clipup.MoEConfig.clip_up())
    loss = contrastive + clipup.aux_loss(model)

``SparseMoE`` is the layer alone, for any model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipup_kernels._version import __version__ as __version__

from .clip.accelerate import accelerate
from .moe.config import MoEConfig
from .moe.layer import SparseMoE, aux_loss, moe_layers
from .moe.metrics import moe_metrics
from .moe.selection_bias import update_selection_bias
from .moe.weight_decay import parameter_groups

if TYPE_CHECKING:
    from .pretrained.factory import create_model_and_transforms, load_checkpoint
    from .pretrained.model_names import get_model_config
    from .pretrained.saving import save_pretrained
    from .pretrained.timm_factory import create_timm_model
    from .pretrained.tokenizers import get_tokenizer
    from .upcycling.calibration import calibrate
    from .upcycling.step0 import step0_difference
    from .upcycling.upcycle import upcycle

# Imported on first access: these modules import open_clip, which takes seconds and which SparseMoE does not need.
_LAZY = {
    "calibrate": "upcycling.calibration",
    "create_model_and_transforms": "pretrained.factory",
    "create_timm_model": "pretrained.timm_factory",
    "get_model_config": "pretrained.model_names",
    "get_tokenizer": "pretrained.tokenizers",
    "load_checkpoint": "pretrained.factory",
    "save_pretrained": "pretrained.saving",
    "step0_difference": "upcycling.step0",
    "upcycle": "upcycling.upcycle",
}

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
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
