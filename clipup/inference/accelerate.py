"""``accelerate``: prepares a model for CPU inference by packing the weights of its MLPs, experts and attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from clipup_kernels import pack_weight
from clipup_kernels.types import QUANTIZATIONS, Quantization

from .. import checks
from ..moe.experts import Experts
from ..precision import Precision
from .prepared import MATRICES, Prepared, PreparedMLP
from .report import BESIDE, NOT_YET, PREPARED_EXPERTS, Selection, has_adapters

M = TypeVar("M", bound=nn.Module)


class NothingToPrepare(ValueError):
    """The model has no layer that can be prepared."""


@overload
def accelerate(  # type: ignore[overload-overlap]  # a single MLP is replaced
    model: nn.Sequential,
    inplace: bool = False,
    weights: Quantization | None = None,
    exclude: Sequence[str] = (),
) -> nn.Sequential | PreparedMLP: ...
@overload
def accelerate(
    model: M, inplace: bool = False, weights: Quantization | None = None, exclude: Sequence[str] = ()
) -> M: ...
@torch.inference_mode(False)  # what is copied there cannot be loaded into elsewhere
@torch.no_grad()
def accelerate(
    model: nn.Module, inplace: bool = False, weights: Quantization | None = None, exclude: Sequence[str] = ()
) -> nn.Module:
    """Prepares a model for CPU inference: layers store packed weights instead of plain ones.

    The outputs of sparse layers are bitwise unchanged, unless they are quantized. Dense MLPs and self-attention in the
    blocks of open_clip, torchvision, timm and transformers (``clipup.inference.prepared_attention`` names them), the
    convolutions that embed the patches of a ViT and, in a model with sparse layers, every ``nn.Sequential`` of a linear
    layer, an activation, perhaps dropout, and a linear layer run on clipup's kernels, with the same outputs up to
    rounding. In text towers that return only the features of the end-of-text token, computation stops at the end of the
    longest text in the batch, as in upcycled models (``clipup.clip.padding_aware``). All other modules are unchanged,
    and ``clipup.accelerate_report(model)`` says of each layer why: MLPs that have a norm between their projections,
    attention beside an MLP that is left (except in int8), attention in float16 (except in int8) and float64, layers
    with PEFT's adapters, what has hooks, buffers, parameters or a ``forward`` that are not its class's, and what lies
    in attention or a block with a ``forward`` of its own. A layer that several modules share is prepared once, for all
    of them; of BERT's MLPs, which are two modules, both must be shared.

    The result is in evaluation mode and has no parameter that requires a gradient. Training, casting or moving a
    prepared layer raises an error. Threads can share prepared layers; deepcopy, pickle and ``load_state_dict``
    (while no other thread computes) work, and ``state_dict()`` has the names and values of the plain model. Upcycle and
    cast before preparing.

    With ``weights="int8"``, the matrices of experts, dense MLPs, attention and patch embeddings are quantized by output
    channel, and their inputs by row at every call; so outputs of sparse layers change too. Attention without a mask
    multiplies in int8, too (``clipup_kernels.self_attention``). ``state_dict()`` then raises: the plain weights are
    gone.

    Packed weights take the memory of plain ones; those of bfloat16 twice as much on CPUs whose instructions have no
    bfloat16 products, and those of float16 everywhere, because they are widened to float32 once instead of in every
    call.

    Args:
        model: a model on the CPU with transformer blocks of a family in ``clipup.dense.mlp_families``, sparse or dense;
            or a single ``SparseMoE`` or MLP.
        inplace: modify ``model`` instead of a copy, all of it or, after an error below, nothing. A single MLP is
            always replaced: use the return value.
        weights: None to keep the weights' type, or "int8".
        exclude: patterns of names in ``model.named_modules()``, as of ``fnmatch``, such as ``["visual.*", "*.attn"]``.
            A layer is left as it is if its name, that of a module around it or that of a linear layer in it matches.

    Raises:
        TypeError: ``model`` is not a module, or contains a SparseMoE of a derived class, as a parametrized one is.
        ValueError: the model has nothing to prepare (NothingToPrepare, with the reasons), or is not on the CPU;
            ``weights`` is unknown; a pattern matches no name; a layer has more inputs than int8 products can sum
            (65,536).
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8 (no compiled extension, or float64).
    """
    checks.module("model", model)
    checks.boolean("inplace", inplace)
    if weights is not None:
        checks.one_of("weights", weights, QUANTIZATIONS)
    _check(model, weights)
    _check_layers(Selection(model, weights, exclude))
    if not inplace:
        model = copy.deepcopy(model)
    chosen = Selection(model, weights, exclude).chosen
    while chosen:  # a plain layer's memory is free before the next one is packed
        plain, kind = chosen.popitem()
        layer = kind.of(plain, weights)
        for parent in model.modules():
            for name in [name for name, child in parent._modules.items() if child is plain]:
                parent.add_module(name, layer)
                layer.placed(parent)
        model = layer if plain is model else model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if weights is not None and hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained = _refuse_to_save  # transformers' writes the config before it asks for weights
    if not isinstance(model, Prepared):
        from ..clip.padding_aware import make_padding_aware  # imports open_clip, which SparseMoE does not need

        make_padding_aware(model)
    return model


def _check_layers(selection: Selection) -> None:
    """Refuses a model before anything is changed: one with nothing to prepare, or with a layer that cannot be."""
    if not any(
        issubclass(kind, (*PREPARED_EXPERTS.values(), PreparedMLP))
        for kind in (*selection.chosen.values(), *map(type, selection.model.modules()))
    ):
        rows = {row.reason: f"\n  {row}" for row in selection.rows() if row.reason not in (NOT_YET, BESIDE)}
        raise NothingToPrepare(f"the model has no sparse layer and no dense MLP to prepare{''.join(rows.values())}")
    for name, module in selection.model.named_modules():
        tensors = selection.chosen[module].read(module) if module in selection.chosen else {}
        for matrix in (value for key, value in tensors.items() if key in MATRICES and value is not None):
            try:
                pack_weight(matrix[..., :1, :], selection.weights)  # one output is refused for the same reasons as all
            except (RuntimeError, TypeError, ValueError) as error:
                raise type(error)(f"{name or 'model'}: {error}") from error


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
        elif has_adapters(module) and any(isinstance(part, Experts) for part in module.children()):
            raise TypeError(f"{name or 'model'} has PEFT's adapters; merge them first: model.merge_and_unload()")
        elif isinstance(module, Experts) and type(module) not in PREPARED_EXPERTS:
            raise TypeError(
                f"{name or 'model'} is a {type(module).__qualname__}, which may compute something else than a "
                "SparseMoE; load its weights into a SparseMoE and prepare that"
            )


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
