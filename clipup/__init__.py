"""CLIP-UP: turns a dense CLIP into a sparse Mixture-of-Experts (MoE) CLIP, trains it and evaluates it.

    model, _, preprocess = clipup.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    model = clipup.upcycle(model, clipup.MoEConfig.clip_up())
    loss = contrastive + clipup.aux_loss(model)

``SparseMoE`` is the layer alone, for any model.
"""

from .extras import lazy_names
from .inference.auto_quantizer import register_quantizer
from .upcycling.auto_classes import register_upcycled

# Public names are listed in __init__.pyi alone, and imported on first access. Some of their modules import open_clip,
# which takes seconds and which SparseMoE does not need. All import torch, for which the command line must not wait
# before it handles Ctrl-C and prints its help.
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)

register_upcycled()
register_quantizer()
