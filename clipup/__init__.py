"""CLIP-UP: turns a dense CLIP into a sparse Mixture-of-Experts (MoE) CLIP, trains it and evaluates it.

    model, _, preprocess = clipup.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    model = clipup.upcycle(model, clipup.MoEConfig.clip_up())
    loss = contrastive + clipup.aux_loss(model)

``SparseMoE`` is the layer alone, for any model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .upcycling.auto_classes import register_upcycled

if TYPE_CHECKING:
    from .inference.accelerate import accelerate
    from .inference.report import accelerate_report
    from .models.factory import create_model_and_transforms, load_checkpoint
    from .models.model_names import get_model_config
    from .models.saving import save_pretrained
    from .models.timm_factory import create_timm_model
    from .models.tokenizers import get_tokenizer
    from .moe.config import MoEConfig
    from .moe.layer import SparseMoE, aux_loss, collect_aux_losses, moe_layers
    from .moe.metrics import moe_metrics
    from .moe.selection_bias import update_selection_bias
    from .moe.weight_decay import parameter_groups
    from .upcycling.calibration import calibrate
    from .upcycling.clusters import initialize_by_clusters
    from .upcycling.step0 import step0_difference
    from .upcycling.upcycle import upcycle

__version__: str

# All imported on first access. Some of these modules import open_clip, which takes seconds and which SparseMoE does not
# need; all import torch, for which the command line must not wait before it handles Ctrl-C and prints its help.
_SUBPACKAGES = ("evaluate", "inspection", "models", "moe", "plan", "search", "train")
_LAZY = {
    "MoEConfig": "moe.config",
    "SparseMoE": "moe.layer",
    "accelerate": "inference.accelerate",
    "accelerate_report": "inference.report",
    "aux_loss": "moe.layer",
    "calibrate": "upcycling.calibration",
    "collect_aux_losses": "moe.layer",
    "create_model_and_transforms": "models.factory",
    "create_timm_model": "models.timm_factory",
    "get_model_config": "models.model_names",
    "get_tokenizer": "models.tokenizers",
    "initialize_by_clusters": "upcycling.clusters",
    "load_checkpoint": "models.factory",
    "moe_layers": "moe.layer",
    "moe_metrics": "moe.metrics",
    "parameter_groups": "moe.weight_decay",
    "save_pretrained": "models.saving",
    "step0_difference": "upcycling.step0",
    "upcycle": "upcycling.upcycle",
    "update_selection_bias": "moe.selection_bias",
}

__all__ = [
    "MoEConfig",
    "SparseMoE",
    "accelerate",
    "accelerate_report",
    "aux_loss",
    "calibrate",
    "collect_aux_losses",
    "create_model_and_transforms",
    "create_timm_model",
    "get_model_config",
    "get_tokenizer",
    "initialize_by_clusters",
    "load_checkpoint",
    "moe_layers",
    "moe_metrics",
    "parameter_groups",
    "save_pretrained",
    "step0_difference",
    "upcycle",
    "update_selection_bias",
]


register_upcycled()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("clipup_kernels").__version__
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
