"""CLIP-UP: turns a dense CLIP into a sparse Mixture-of-Experts (MoE) CLIP, trains it and evaluates it.

    model, _, preprocess = clipup.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    model = clipup.upcycle(model, clipup.MoEConfig.clip_up())
    loss = contrastive + clipup.aux_loss(model)

``SparseMoE`` is the layer alone, for any model.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from .inference.auto_quantizer import register_quantizer
from .upcycling.auto_classes import register_upcycled

# Public names are listed in __init__.pyi alone, and imported on first access. Some of their modules import open_clip,
# which takes seconds and which SparseMoE does not need. All import torch, for which the command line must not wait
# before it handles Ctrl-C and prints its help.
_MODULES = {
    alias.name: "." * node.level + (node.module or alias.name)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(name for name, module in _MODULES.items() if module.count(".") > 1)  # without __version__ and rooms


register_upcycled()
register_quantizer()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name], __name__)
    return module if _MODULES[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
