"""The table of supported MLP families, and what reads them. The modules' classes are known by name, not imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipup_kernels import ACTIVATIONS

from .dense_mlp import (
    DenseMLP,
    check_linears,
    read_activation,
    read_dropout,
    read_linears,
    read_norm,
    refuse_dropout,
)
from .transformers_models import full_name


@dataclass(frozen=True)
class Family:
    """Blocks of these classes have an MLP made of these parts, which ``read`` converts to a ``DenseMLP``."""

    blocks: tuple[str, ...]
    """Full class names of the blocks."""
    parts: tuple[tuple[str, str], ...]
    """(path in the block, full class name) of the modules that make up the MLP, usually one. A sparse layer replaces
    the first, whose input it takes."""
    read: Callable[..., DenseMLP]
    """Reads the parts, one argument each."""
    passed: tuple[str, ...] = ()
    """Paths of the projections in the other parts, which ``nn.Identity`` replaces: the sparse layer includes them."""


ANY_OTHER = "of an MLP that is not read, SparseMoE.from_dense takes the tensors as a DenseMLP (docs/layer.md)"
"""Ends the messages about MLPs that belong to no family."""


def _read_sequential(mlp: Any) -> DenseMLP:
    """A linear layer, an activation, and a linear layer; between the last two perhaps dropout, then perhaps a norm."""
    parts = [(name, part) for name, part in mlp._modules.items() if type(part) is not nn.Identity]  # one may come twice
    after = [parts.pop()] if parts and type(parts[-1][1]) is nn.Dropout else []
    between = parts[2:-1]
    dropped = [between.pop(0)] if between and type(between[0][1]) is nn.Dropout else []
    misplaced = len(between) > 1 or any(read_activation(part) in ACTIVATIONS for _, part in between)
    if len(parts) < 3 or misplaced or any(type(parts[place][1]) is not nn.Linear for place in (0, -1)):
        listed = ", ".join(type(part).__name__ for part in mlp) or "nothing"
        raise TypeError(f"cannot read an nn.Sequential of {listed} as an MLP; {ANY_OTHER}")
    (_, first), (_, activation), (_, second) = parts[0], parts[1], parts[-1]
    for named in after:
        refuse_dropout(*named)
    others: dict[str, Any] = read_norm(*between[0]) if between else {}
    dropout = sum(read_dropout(*named) for named in dropped)
    return read_linears({"in": first, "out": second}, activation, dropout=dropout, **others)


def _read_halves(order: tuple[str, str], both: nn.Module, out: nn.Module, **others: Any) -> DenseMLP:
    """A gated MLP in which one linear layer holds both projections into the hidden width, in this order."""
    check_linears(both, out)
    fields: dict[str, Any] = {"out_weight": out.weight, "out_bias": out.bias}
    for part in ("weight", "bias"):
        tensor = getattr(both, part)
        halves = (None, None) if tensor is None else tensor.chunk(2)
        fields |= {f"{name}_{part}": half for name, half in zip(order, halves, strict=True)}
    return DenseMLP(**fields, **others)


def _dropout(mlp: Any) -> float:
    """The dropout between the projections of timm's MLPs; dropout after them is refused."""
    refuse_dropout("drop2", mlp.drop2)
    return read_dropout("drop1", mlp.drop1)


def _between(mlp: Any) -> dict[str, Any]:
    return {"dropout": _dropout(mlp), **read_norm("norm", mlp.norm)}


def _linears(
    names: dict[str, str], activation: str, others: Callable[[Any], dict[str, Any]] = lambda mlp: {}
) -> Callable[[Any], DenseMLP]:
    """The reader of MLPs whose linear layers and activation have these names. ``others``: further fields."""
    return lambda mlp: read_linears(
        {name: getattr(mlp, path) for name, path in names.items()}, getattr(mlp, activation), **others(mlp)
    )


_FC = {"in": "fc1", "out": "fc2"}
_UP_DOWN = {"in": "up_proj", "out": "down_proj"}
_GATE_UP_DOWN = {**_UP_DOWN, "gate": "gate_proj"}
_OPEN_CLIP_BLOCKS = (
    "open_clip.transformer.ResidualAttentionBlock",
    "open_clip.transformer.CustomResidualAttentionBlock",
    "open_clip.transformer.ModernTextBlock",
)
_TIMM_BLOCKS = (
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer.ResPostBlock",
    "timm.models.vision_transformer_relpos.RelPosBlock",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock",
    "timm.models.eva.EvaBlock",
    "timm.models.eva.EvaBlockPostNorm",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.convnext.ConvNeXtBlock",
)


def _timm(mlp: str, read: Callable[..., DenseMLP]) -> Family:
    return Family(_TIMM_BLOCKS, (("mlp", mlp),), read)


def _hugging_face(model: str, block: str, mlp: str, read: Callable[..., DenseMLP], path: str = "mlp") -> Family:
    return Family((full_name(model, block),), ((path, full_name(model, mlp)),), read)


def _mt5(mlp: str, names: dict[str, str]) -> Family:
    read = _linears(names, "act", lambda mlp: {"dropout": read_dropout("dropout", mlp.dropout)})
    return _hugging_face("mt5", "MT5Block", mlp, read, "layer.1.DenseReluDense")


def _llama(model: str, name: str) -> Family:
    return _hugging_face(model, f"{name}DecoderLayer", f"{name}MLP", _linears(_GATE_UP_DOWN, "act_fn"))


def _pair(model: str, name: str) -> Family:
    parts = (("intermediate", full_name(model, f"{name}Intermediate")), ("output", full_name(model, f"{name}Output")))
    # the second projection is in the module that also adds the residual and normalizes, which stays
    return Family(
        (full_name(model, f"{name}Layer"),),
        parts,
        lambda first, second: read_linears({"in": first.dense, "out": second.dense}, first.intermediate_act_fn),
        passed=("output.dense",),
    )


FAMILIES: tuple[Family, ...] = (
    Family(_OPEN_CLIP_BLOCKS, (("mlp", "torch.nn.modules.container.Sequential"),), _read_sequential),
    Family(
        _OPEN_CLIP_BLOCKS,
        (("mlp", "open_clip.transformer.SwiGLU"),),  # open_clip 4
        lambda mlp: _read_halves(("in", "gate"), mlp.w12, mlp.w3, activation="silu"),
    ),
    _timm("timm.layers.mlp.Mlp", _linears(_FC, "act", _between)),
    _timm("timm.layers.mlp.SwiGLU", _linears({"in": "fc1_x", "gate": "fc1_g", "out": "fc2"}, "act", _between)),
    _timm(
        "timm.layers.mlp.GluMlp",
        lambda mlp: _read_halves(
            ("in", "gate") if mlp.gate_last else ("gate", "in"),
            mlp.fc1,
            mlp.fc2,
            activation=read_activation(mlp.act),
            **_between(mlp),
        ),
    ),
    _timm(
        "timm.models.vitamin.GeGluMlp",
        _linears(
            {"in": "w1", "gate": "w0", "out": "w2"},
            "act",
            lambda mlp: {"dropout": _dropout(mlp), "input_norm": mlp.norm},
        ),
    ),
    _mt5("MT5DenseActDense", {"in": "wi", "out": "wo"}),
    _mt5("MT5DenseGatedActDense", {"in": "wi_1", "gate": "wi_0", "out": "wo"}),
    _hugging_face(
        "modernbert",
        "ModernBertEncoderLayer",
        "ModernBertMLP",
        lambda mlp: _read_halves(  # the first half is activated
            ("gate", "in"),
            mlp.Wi,
            mlp.Wo,
            activation=read_activation(mlp.act),
            dropout=read_dropout("drop", mlp.drop),
        ),
    ),
    _pair("bert", "Bert"),
    _pair("roberta", "Roberta"),
    _pair("xlm_roberta", "XLMRoberta"),
    _hugging_face("clip", "CLIPEncoderLayer", "CLIPMLP", _linears(_FC, "activation_fn")),
    _hugging_face("siglip", "SiglipEncoderLayer", "SiglipMLP", _linears(_FC, "activation_fn")),
    _hugging_face("siglip2", "Siglip2EncoderLayer", "Siglip2MLP", _linears(_FC, "activation_fn")),
    _hugging_face("vit", "ViTLayer", "ViTMLP", _linears(_FC, "activation_fn")),
    _hugging_face("dinov2", "Dinov2Layer", "Dinov2MLP", _linears(_FC, "activation_fn")),
    _hugging_face("dinov2", "Dinov2Layer", "Dinov2SwiGLUFFN", _linears(_GATE_UP_DOWN, "act_fn")),
    _hugging_face("dinov3_vit", "DINOv3ViTLayer", "DINOv3ViTMLP", _linears(_UP_DOWN, "act_fn")),
    _hugging_face("dinov3_vit", "DINOv3ViTLayer", "DINOv3ViTGatedMLP", _linears(_GATE_UP_DOWN, "act_fn")),
    _llama("llama", "Llama"),
    _llama("mistral", "Mistral"),
    _llama("qwen2", "Qwen2"),
    _llama("qwen3", "Qwen3"),
    _llama("gemma", "Gemma"),
    Family(
        ("torchvision.models.vision_transformer.EncoderBlock",),
        (("mlp", "torchvision.models.vision_transformer.MLPBlock"),),
        _read_sequential,
    ),
)
"""The supported families; blocks and MLPs of one library can be combined freely."""
