"""Which models of transformers can be upcycled, and the classes that they are made of, which are known by name.
``import clipup`` reads this, so it imports nothing. What their MLPs are made of: ``mlp_readers``.
"""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """The models of a package of transformers."""

    types: tuple[str, ...]
    """transformers' names of the models."""
    block: str
    """Class of the models' blocks."""
    tower: str | None
    """The tower, "image" or "text"; None where both have this block, and the name of the block or the model tells."""
    attention: tuple[str, ...]
    """Attention classes that only call their linear layers, so that prepared layers can replace them."""


PACKAGES = {
    "clip": Package(("clip", "clip_vision_model", "clip_text_model"), "CLIPEncoderLayer", None, ("CLIPAttention",)),
    "siglip": Package(
        ("siglip", "siglip_vision_model", "siglip_text_model"), "SiglipEncoderLayer", None, ("SiglipAttention",)
    ),
    "siglip2": Package(
        ("siglip2", "siglip2_vision_model", "siglip2_text_model"), "Siglip2EncoderLayer", None, ("Siglip2Attention",)
    ),
    "vit": Package(("vit",), "ViTLayer", "image", ("ViTAttention", "ViTSelfAttention", "ViTSelfOutput")),
    "dinov2": Package(("dinov2",), "Dinov2Layer", "image", ("Dinov2Attention",)),
    "dinov3_vit": Package(("dinov3_vit",), "DINOv3ViTLayer", "image", ("DINOv3ViTAttention",)),
    "bert": Package(("bert",), "BertLayer", "text", ("BertSelfAttention", "BertSelfOutput")),
    "roberta": Package(("roberta",), "RobertaLayer", "text", ("RobertaSelfAttention", "RobertaSelfOutput")),
    "xlm_roberta": Package(
        ("xlm-roberta",), "XLMRobertaLayer", "text", ("XLMRobertaSelfAttention", "XLMRobertaSelfOutput")
    ),
    "modernbert": Package(("modernbert",), "ModernBertEncoderLayer", "text", ("ModernBertAttention",)),
}
"""By the name of the package."""
MODEL_TYPES = tuple(name for package in PACKAGES.values() for name in package.types)
SPARSE_PREFIX = "clipup_"
"""Prefix of the model types of upcycled models."""


def full_name(package: str, name: str) -> str:
    """The full name of a class in a package of transformers."""
    return f"transformers.models.{package}.modeling_{package}.{name}"
