"""``accelerate``: a model for inference on CPUs, its MLPs and experts prepared ahead."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .. import checks
from ..dense.mlp_families import BlockMLP, families_read, find_mlp, read_mlp
from ..dense.prepared import MATRICES, Prepared, PreparedMLP
from ..moe.experts import Experts
from ..moe.layer import SparseMoE
from ..moe.prepared import PreparedMoE
from ..precision import Precision


class NothingToPrepare(ValueError):
    """The model has no layer that could be prepared."""


@torch.no_grad()
def accelerate(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Prepares a model for inference on a CPU: layers, sparse and dense, hold packed weights in place of plain ones.

    Sparse layers compute bitwise what they did. Dense MLPs run on this project's kernels and compute the same to
    rounding. On a text tower that returns nothing but its end-of-text token's features, computation stops at the end of
    the batch's longest text, as in upcycled ones (``clipup.clip.padding_aware``). What is not prepared (attention,
    norms, MLPs that are spread over several modules as BERT's, that have a norm between their projections, or hooks)
    runs as before.

    The result is in evaluation mode, and no parameter of it requires a gradient. Prepared layers cannot be trained,
    written to, cast or moved: an error says so. Threads may share them; deepcopy, pickle and ``load_state_dict`` work,
    and ``state_dict()`` has the plain model's names and values. Upcycle and cast before.

    Args:
        model: on the CPU: a model with transformer blocks of a family that ``clipup.dense.mlp_families`` reads, sparse
            or dense; or one ``SparseMoE``, or one MLP.
        inplace: change ``model`` itself instead of a copy. An MLP by itself is replaced in any case: use what is
            returned.

    Raises:
        TypeError: not a module; a SparseMoE that is pruned, parametrized, or overrides what SparseMoE computes.
        ValueError: the model has nothing to prepare (NothingToPrepare), or is on another device.
    """
    checks.module("model", model)
    checks.boolean("inplace", inplace)
    _check(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not inplace:
        model = copy.deepcopy(model, _shared_until_packed(model))
    if _is_mlp(model):
        prepared = PreparedMLP(model)
        if not inplace:
            _copy_parameters(prepared, own)
        return prepared.requires_grad_(False)
    sparse = _sparse_layers(model)
    dense = _dense_mlps(model)
    if not sparse and not dense and not any(isinstance(module, Prepared) for module in model.modules()):
        raise NothingToPrepare(f"the model has no sparse layer and no dense MLP to prepare; {families_read()}")
    for layer in sparse:
        layer.__class__ = PreparedMoE
        layer.prepare()
    for mlp in dense:
        mlp.replace(PreparedMLP(mlp.module))
    if not inplace:
        _copy_parameters(model, own)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if not isinstance(model, SparseMoE):
        from .padding_aware import leave_padding_out  # brings open_clip, which SparseMoE does without

        leave_padding_out(model)
    return model


def _copy_parameters(model: nn.Module, theirs: set[int]) -> None:
    """Gives a copy its own parameters where it still has those of the model that it was made of: what was shared to be
    packed, and is used elsewhere too."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in theirs:
                copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                module._parameters[name] = copies[id(parameter)]


def _check(model: nn.Module) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    if devices:
        raise ValueError(f"the model is on {devices.pop()}; it is prepared for CPUs, move it there first: model.cpu()")
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE) and not isinstance(module, Prepared) and _overrides(type(module)):
            raise TypeError(
                f"{name or 'model'} is a {type(module).__qualname__}, which overrides what SparseMoE computes, so it "
                "cannot be prepared"
            )
        missing = [
            n
            for n in MATRICES
            if isinstance(module, Experts) and not isinstance(module, Prepared) and n not in module._parameters
        ]
        if missing:
            raise TypeError(
                f"{missing[0]} of {name or 'the layer'} is no plain parameter (pruned, or parametrized); make it one "
                "before preparing: torch.nn.utils.prune.remove, or parametrize.remove_parametrizations"
            )


def _overrides(layer_class: type[SparseMoE]) -> bool:
    computing = ("__call__", "forward", "run_experts")
    return any(getattr(layer_class, name) is not getattr(SparseMoE, name) for name in computing)


def _sparse_layers(model: nn.Module) -> list[SparseMoE]:
    return [m for m in model.modules() if isinstance(m, SparseMoE) and not isinstance(m, Prepared)]


def _shared_until_packed(model: nn.Module) -> dict[int, object]:
    """A deepcopy's memo in which the weights that will be packed stand for themselves, so that they are copied once."""
    sparse = _sparse_layers(model)
    stacks = [experts for layer in sparse for experts in (layer, layer.shared) if experts is not None]
    weights = [experts._parameters[name] for experts in stacks for name in MATRICES]
    mlps = [model] if _is_mlp(model) else [mlp.module for mlp in _dense_mlps(model)]
    for mlp in mlps:
        weights += mlp.parameters()
    return {id(weight): weight for weight in weights if weight is not None}


def _is_mlp(module: nn.Module) -> bool:
    try:
        return read_mlp(module).ln_weight is None
    except TypeError:
        return False


def _dense_mlps(model: nn.Module) -> list[BlockMLP]:
    """The MLPs of a model's blocks that are one module each, which ``dense_mlp`` computes."""
    found = []
    for block in model.modules():
        try:
            mlp = find_mlp(block)
        except TypeError:
            continue
        if len(mlp.family.parts) == 1 and mlp.dense.ln_weight is None:
            found.append(mlp)
    return found


def for_inference(model: nn.Module, precision: Precision = "fp32") -> nn.Module:
    """The model itself, prepared (``clipup.accelerate``) where that is faster: on a CPU and outside of autocast, which
    would cast weights that are packed already. In evaluation mode in any case."""
    model.eval()
    if next(model.parameters()).device.type != "cpu" or precision in ("amp", "amp_bf16"):
        return model
    try:
        return accelerate(model, inplace=True)
    except NothingToPrepare:
        return model
