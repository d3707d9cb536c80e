"""Which layers of a model ``accelerate`` prepares, and why it leaves the others. Looks at a model, changes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from clipup_kernels import packed_layout
from clipup_kernels.types import PLAIN_LAYOUT

from ..dense.dense_mlp import class_name, library_class
from ..dense.mlp_families import find_mlp, read_mlp
from ..dense.mlp_readers import FAMILIES
from ..moe.experts import Experts, SharedExpert
from ..moe.layer import SparseMoE
from .prepared import Prepared, PreparedMLP, mlp_can_be_prepared
from .prepared_attention import (
    ATTENTION_MODULES,
    ATTENTIONS,
    SELF_ATTENTION_BLOCKS,
    attention_class,
    can_be_prepared,
)
from .prepared_experts import PreparedMoE, PreparedSharedExpert
from .prepared_linear import (
    PATCH_EMBEDDINGS,
    PreparedLinear,
    PreparedPatches,
    linear_can_be_prepared,
    patches_can_be_prepared,
)

PREPARED_EXPERTS: dict[type[nn.Module], type[Prepared]] = {SparseMoE: PreparedMoE, SharedExpert: PreparedSharedExpert}
_ADAPTERS = "it has PEFT's adapters; merge them first: model.merge_and_unload()"
BESIDE = "beside an MLP that is left, attention is prepared in int8 only"
_LOST = "hooks, a forward, tensors or parts of its own would be lost"
_BLOCKS = {name for family in FAMILIES for name in family.blocks}


class Selection(NamedTuple):
    """The plain layers of a model, each once, wherever it is used."""

    chosen: dict[nn.Module, type[Prepared]]
    """Those to prepare, and as what."""
    left: dict[nn.Module, str]
    """Why others are left: plain layers, or modules that hold some. Layers that are not looked at are in neither."""


def select(model: nn.Module, weights: str | None) -> Selection:
    """Args: as ``accelerate``.

    Raises:
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8.
    """
    selection = Selection({}, {})
    for module in model.modules():
        if type(module) in PREPARED_EXPERTS:
            selection.chosen[module] = PREPARED_EXPERTS[type(module)]
    if _is_mlp(model):
        selection.chosen[model] = PreparedMLP
        return selection
    blocks = [
        module
        for module in model.modules()
        if library_class(module) in _BLOCKS or any(isinstance(child, SparseMoE) for child in module.children())
    ]
    for block in blocks:
        if "forward" in vars(block):  # it may read weights directly instead of calling a layer
            selection.left[block] = _LOST
        else:
            _select_mlp(block, selection)
    for block in blocks:
        if block not in selection.left:
            parts = (part in selection.chosen or isinstance(part, Prepared) for part in block.modules())
            _select_attention(block, weights, weights is not None or any(parts), selection)
    for module in model.modules():
        if class_name(module) in PATCH_EMBEDDINGS:
            for child in (child for child in module.children() if isinstance(child, nn.Conv2d)):
                fits = "forward" not in vars(module) and patches_can_be_prepared(child)
                _choose(child, fits, child.weight, PreparedPatches, weights, selection)
    return selection


def _select_mlp(block: nn.Module, selection: Selection) -> None:
    inner = dict(block.named_modules())
    families = [family for family in FAMILIES if library_class(block) in family.blocks]
    try:
        mlp = find_mlp(block)
        if len(mlp.family.parts) > 1:
            reason = "MLPs of several modules, as BERT's, are not supported yet"
        elif mlp_can_be_prepared(mlp.module, mlp.dense):
            selection.chosen[mlp.module] = PreparedMLP
            return
        else:
            reason = _LOST if mlp.dense.ln_weight is None else "a norm between its projections is not supported"
    except TypeError as error:
        reason = str(error).split("; ")[0]  # then comes what upcycling could do
    for part in (inner[path] for family in families for path, _ in family.parts if path in inner):
        if not isinstance(part, Experts | Prepared):
            selection.left[part] = _ADAPTERS if any(map(has_adapters, part.modules())) else reason


def _select_attention(module: nn.Module, weights: str | None, beside: bool, selection: Selection) -> None:
    """Selects self-attention in a block: ``nn.MultiheadAttention`` and the linear layers of ``ATTENTIONS``. What is
    or holds something else than its class says is left as it is; so is what no kernel here computes, since torch's
    products are faster than those of a fallback.

    Args:
        beside: whether attention is prepared there at all: with an MLP or experts, or in int8.
    """
    for child in module.children():
        if isinstance(child, Prepared) or child in selection.chosen or child in selection.left:
            continue
        if has_adapters(child):
            selection.left[child] = _ADAPTERS
        elif "forward" in vars(child):
            selection.left[child] = _LOST
        elif isinstance(child, nn.Linear):
            if class_name(module) in ATTENTIONS:
                fits = linear_can_be_prepared(child)
                _choose(child, fits, child.weight, PreparedLinear, weights, selection, beside)
        elif class_name(child) not in ATTENTION_MODULES:
            _select_attention(child, weights, beside, selection)
        elif not _attends_to_itself(module):
            selection.left[child] = f"{class_name(module)} may ask it for more than self-attention"
        else:
            kind = attention_class(child)
            _choose(child, can_be_prepared(child), child.in_proj_weight, kind, weights, selection, beside)


def _choose(
    module: nn.Module,
    fits: bool,
    weight: Any,
    kind: type[Prepared],
    weights: str | None,
    selection: Selection,
    beside: bool = True,
) -> None:
    if not fits:
        selection.left[module] = _LOST
    elif not _is_packed(weight, weights):
        selection.left[module] = f"no kernel of this CPU is faster than torch's with its {weight.dtype} weights"
    elif not beside:
        selection.left[module] = BESIDE
    else:
        selection.chosen[module] = kind


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is a layer with PEFT's adapters around it."""
    return type(module).__module__.startswith("peft.") and "base_layer" in module._modules


def _is_packed(weight: torch.Tensor, weights: str | None) -> bool:
    """Whether packed weights of its type are worth it: those of float16 are float32, twice as large."""
    known = (torch.float32, torch.bfloat16) if weights is None else (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype in known and packed_layout(weight.dtype, weights) != PLAIN_LAYOUT


def _attends_to_itself(block: nn.Module) -> bool:
    """Whether a block's attention gets one tensor, and its attention weights are not asked for."""
    if library_class(block) not in SELF_ATTENTION_BLOCKS or hasattr(block, "ln_1_kv"):
        return False  # the latter is open_clip's cross-attention
    return "attention" not in vars(block)


def _is_mlp(module: nn.Module) -> bool:
    try:
        return mlp_can_be_prepared(module, read_mlp(module))
    except TypeError:
        return False
