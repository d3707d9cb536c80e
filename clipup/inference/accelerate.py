"""``accelerate``: prepares a model for CPU inference by packing the weights of its MLPs, experts and attention."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from clipup_kernels import packed_layout
from clipup_kernels.types import PLAIN_LAYOUT, QUANTIZATIONS, Quantization

from .. import checks
from ..dense.dense_mlp import class_name, library_class
from ..dense.mlp_families import BlockMLP, find_mlp, read_mlp
from ..dense.mlp_readers import FAMILIES
from ..moe.experts import Experts, SharedExpert
from ..moe.layer import SparseMoE
from ..precision import Precision
from .prepared import Prepared, PreparedMLP, mlp_can_be_prepared
from .prepared_attention import (
    ATTENTION_MODULES,
    ATTENTIONS,
    SELF_ATTENTION_BLOCKS,
    can_be_prepared,
    prepared_attention,
)
from .prepared_experts import PreparedMoE, PreparedSharedExpert
from .prepared_linear import (
    PATCH_EMBEDDINGS,
    PreparedLinear,
    PreparedPatches,
    linear_can_be_prepared,
    patches_can_be_prepared,
)

M = TypeVar("M", bound=nn.Module)
_PREPARED: dict[type[Experts], type[PreparedMoE | PreparedSharedExpert]] = {
    SparseMoE: PreparedMoE,
    SharedExpert: PreparedSharedExpert,
}


class NothingToPrepare(ValueError):
    """The model has no layer that can be prepared."""


@overload
def accelerate(  # type: ignore[overload-overlap]  # a single MLP is replaced
    model: nn.Sequential, inplace: bool = False, weights: Quantization | None = None
) -> nn.Sequential | PreparedMLP: ...
@overload
def accelerate(model: M, inplace: bool = False, weights: Quantization | None = None) -> M: ...
@torch.inference_mode(False)  # what is copied there cannot be loaded into elsewhere
@torch.no_grad()
def accelerate(model: nn.Module, inplace: bool = False, weights: Quantization | None = None) -> nn.Module:
    """Prepares a model for CPU inference: layers store packed weights instead of plain ones.

    The outputs of sparse layers are bitwise unchanged, unless they are quantized. Dense MLPs, self-attention in the
    blocks of open_clip, torchvision, timm and transformers (``clipup.inference.prepared_attention`` names them) and the
    convolutions that embed the patches of a ViT run on clipup's kernels, with the same outputs up to rounding. In text
    towers that return only the features of the end-of-text token, computation stops at the end of the longest text in
    the batch, as in upcycled models (``clipup.clip.padding_aware``). All other modules are unchanged: norms, MLPs that
    consist of several modules (as in BERT) or have a norm between their projections, attention beside these, attention
    in float16 and float64, what has hooks, buffers, parameters or a ``forward`` that are not its class's, and what lies
    in attention or a block with a ``forward`` of its own.

    The result is in evaluation mode and has no parameter that requires a gradient. Training, casting or moving a
    prepared layer raises an error. Threads can share prepared layers; deepcopy, pickle and ``load_state_dict``
    (while no other thread computes) work, and ``state_dict()`` has the names and values of the plain model. Upcycle and
    cast before preparing.

    With ``weights="int8"``, the matrices of experts, dense MLPs, attention and patch embeddings are quantized by output
    channel, and their inputs by row at every call; so outputs of sparse layers change too. Attention without a mask
    multiplies in int8, too (``clipup_kernels.self_attention``). ``state_dict()`` then raises: the plain weights are
    gone.

    Args:
        model: a model on the CPU with transformer blocks of a family in ``clipup.dense.mlp_families``, sparse or dense;
            or a single ``SparseMoE`` or MLP.
        inplace: modify ``model`` instead of a copy. A single MLP is always replaced: use the return value.
        weights: None to keep the weights' type, or "int8".

    Raises:
        TypeError: ``model`` is not a module, or contains a SparseMoE of a derived class, as a parametrized one is.
        ValueError: the model has nothing to prepare (NothingToPrepare), or is not on the CPU; ``weights`` is unknown.
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8 (no compiled extension, or float64).
    """
    checks.module("model", model)
    checks.boolean("inplace", inplace)
    if weights is not None:
        checks.one_of("weights", weights, QUANTIZATIONS)
    _check(model, weights)
    if not inplace:
        model = copy.deepcopy(model)
    if _is_mlp(model):
        return PreparedMLP(model, weights).requires_grad_(False)
    experts: list[Any] = [module for module in model.modules() if type(module) in _PREPARED]
    dense = _dense_mlps(model)
    if not experts and not dense and not any(isinstance(module, Prepared) for module in model.modules()):
        raise NothingToPrepare(
            "the model has no sparse layer and no dense MLP to prepare; `clipup doctor MODEL` says for each block why"
        )
    for layer in experts:
        _PREPARED[type(layer)].prepare(layer, weights)
    for mlp in dense:
        mlp.replace(PreparedMLP(mlp.module, weights))
    for block in _blocks(model):
        if weights is not None or any(isinstance(part, Prepared) for part in block.modules()):
            _prepare_attention(block, weights)
    for module in list(model.modules()):
        if class_name(module) in PATCH_EMBEDDINGS and "forward" not in vars(module):
            _prepare_patches(module, weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if weights is not None and hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained = _refuse_to_save  # transformers' writes the config before it asks for weights
    if not isinstance(model, SparseMoE):
        from ..clip.padding_aware import make_padding_aware  # imports open_clip, which SparseMoE does not need

        make_padding_aware(model)
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "the model holds quantized weights, from which the plain ones cannot be restored; save the plain model, or "
        "pickle the prepared one"
    )


def _check(model: nn.Module, weights: str | None) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    if devices:
        raise ValueError(f"the model is on {devices.pop()}, but it must be on the CPU; move it first: model.cpu()")
    for name, module in model.named_modules():
        if isinstance(module, Prepared):
            if module.quantize != weights:
                raise ValueError(
                    f"{name or 'model'} was prepared with weights={module.quantize!r} before, and cannot be changed to "
                    f"{weights!r}; prepare the plain model"
                )
        elif type(module).__module__.startswith("peft.") and any(isinstance(e, Experts) for e in module.children()):
            raise TypeError(f"{name or 'model'} has PEFT's adapters; merge them first: model.merge_and_unload()")
        elif isinstance(module, Experts) and type(module) not in _PREPARED:
            raise TypeError(
                f"{name or 'model'} is a {type(module).__qualname__}, which may compute something else than a "
                "SparseMoE; load its weights into a SparseMoE and prepare that"
            )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks that call their layers."""
    names = {name for family in FAMILIES for name in family.blocks}
    return [
        module
        for module in model.modules()
        if library_class(module) in names or any(isinstance(child, SparseMoE) for child in module.children())
        if "forward" not in vars(module)  # it may read weights directly instead of calling a layer
    ]


def _prepare_attention(module: nn.Module, weights: str | None) -> None:
    """Prepares self-attention in a block: ``nn.MultiheadAttention`` and the linear layers of ``ATTENTIONS``. What is
    or holds something else than its class says is left as it is; so is what no kernel here computes, since torch's
    products are faster than those of a fallback."""
    for name, child in list(module.named_children()):
        if isinstance(child, Prepared | SparseMoE) or "forward" in vars(child):
            continue
        if isinstance(child, nn.Linear):
            if class_name(module) in ATTENTIONS and linear_can_be_prepared(child) and _is_packed(child.weight, weights):
                setattr(module, name, PreparedLinear(child, weights))
        elif class_name(child) not in ATTENTION_MODULES or not _attends_to_itself(module):
            _prepare_attention(child, weights)
        elif can_be_prepared(child) and _is_packed(cast(nn.Parameter, child.in_proj_weight), weights):
            setattr(module, name, prepared_attention(child, weights))


def _prepare_patches(embedding: nn.Module, weights: str | None) -> None:
    for name, child in list(embedding.named_children()):
        if patches_can_be_prepared(child) and _is_packed(cast(nn.Conv2d, child).weight, weights):
            setattr(embedding, name, PreparedPatches(cast(nn.Conv2d, child), weights))


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


def _dense_mlps(model: nn.Module) -> list[BlockMLP]:
    """The MLPs that ``PreparedMLP`` can replace in blocks that call their layers: those that are a single module."""
    found = []
    for block in model.modules():
        try:
            mlp = find_mlp(block)
        except TypeError:
            continue
        if "forward" not in vars(block) and len(mlp.family.parts) == 1 and mlp_can_be_prepared(mlp.module, mlp.dense):
            found.append(mlp)
    return found


def for_inference(model: M, precision: Precision = "fp32", weights: Quantization | None = None) -> M:
    """Puts a model into evaluation mode and prepares it in place (``clipup.accelerate``) where that is faster: on the
    CPU without autocast, which would have to cast packed weights. With ``weights``, that is required."""
    model.eval()
    if weights is not None:
        return accelerate(model, inplace=True, weights=weights)
    if next(model.parameters()).device.type != "cpu" or precision in ("amp", "amp_bf16"):
        return model
    try:
        return accelerate(model, inplace=True)
    except NothingToPrepare:
        return model
