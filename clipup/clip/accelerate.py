"""``accelerate``: prepares a model for CPU inference by packing the weights of its MLPs, experts and attention."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar, cast, overload

import torch
from torch import nn

from clipup_kernels import pack_weight, packed_layout
from clipup_kernels.types import PLAIN_LAYOUT, QUANTIZATIONS

from .. import checks
from ..dense.dense_mlp import class_name, has_another_forward, was_defined_with
from ..dense.mlp_families import BlockMLP, find_mlp, read_mlp
from ..dense.mlp_readers import FAMILIES
from ..dense.prepared import MATRICES, Prepared, PreparedMLP, mlp_can_be_prepared
from ..dense.prepared_attention import (
    ATTENTION_MODULES,
    ATTENTIONS,
    SELF_ATTENTION_BLOCKS,
    PreparedLinear,
    can_be_prepared,
    linear_can_be_prepared,
    prepared_attention,
)
from ..moe.experts import Experts, SharedExpert
from ..moe.layer import SparseMoE
from ..moe.prepared import PreparedMoE, PreparedSharedExpert
from ..precision import Precision

M = TypeVar("M", bound=nn.Module)
_HARMLESS = {
    *("__init__", "__new__", "__init_subclass__", "__class_getitem__", "__subclasshook__", "extra_repr", "__repr__"),
    *("__dict__", "__weakref__", "__annotate__", "__annotate_func__"),  # which Python adds
}
"""What a class derived from a layer may define without another computation, or losing something."""

_PREPARED: dict[type[Experts], type[PreparedMoE | PreparedSharedExpert]] = {
    SparseMoE: PreparedMoE,
    SharedExpert: PreparedSharedExpert,
}


class NothingToPrepare(ValueError):
    """The model has no layer that can be prepared."""


@overload
def accelerate(  # type: ignore[overload-overlap]  # a single MLP is replaced
    model: nn.Sequential, inplace: bool = False, weights: str | None = None
) -> nn.Sequential | PreparedMLP: ...
@overload
def accelerate(model: M, inplace: bool = False, weights: str | None = None) -> M: ...
@torch.inference_mode(False)  # what is copied there cannot be loaded into elsewhere
@torch.no_grad()
def accelerate(model: nn.Module, inplace: bool = False, weights: str | None = None) -> nn.Module:
    """Prepares a model for CPU inference: layers store packed weights instead of plain ones.

    The outputs of sparse layers are bitwise unchanged, unless they are quantized. Dense MLPs, and self-attention in the
    blocks of open_clip, torchvision, timm and transformers (``clipup.dense.prepared_attention`` names them), run on
    clipup's kernels, with the same outputs up to rounding. In text towers that return only the features of the
    end-of-text token, computation stops at the end of the longest text in the batch, as in upcycled models
    (``clipup.clip.padding_aware``). All other modules are unchanged: norms, MLPs that consist of several modules (as in
    BERT) or have a norm between their projections, attention beside these, attention in float16 and float64, what has
    hooks, methods, buffers or parameters that are not its class's, and what lies in attention or a block with a
    ``forward`` that is not its class's, or was assigned to the class.

    The result is in evaluation mode and has no parameter that requires a gradient. Training, modifying, casting or
    moving a prepared layer raises an error. Threads can share prepared layers; deepcopy, pickle and ``load_state_dict``
    (while no other thread computes) work, and ``state_dict()`` has the names and values of the plain model. Upcycle and
    cast before preparing.

    With ``weights="int8"``, the matrices of experts, dense MLPs and attention are quantized by output channel, and
    their inputs by row at every call; so outputs of sparse layers change too. ``state_dict()`` then raises: the plain
    weights are gone.

    Args:
        model: a model on the CPU with transformer blocks of a family in ``clipup.dense.mlp_families``, sparse or dense;
            or a single ``SparseMoE`` or MLP.
        inplace: modify ``model`` instead of a copy. A single MLP is always replaced: use the return value.
        weights: None to keep the weights' type, or "int8".

    Raises:
        TypeError: ``model`` is not a module, or contains a SparseMoE that is pruned, parametrized, of a derived
            class that defines functions or properties, or with another shared expert than clipup's.
        ValueError: the model has nothing to prepare (NothingToPrepare), or is not on the CPU; ``weights`` is unknown.
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8 (no compiled extension, or float64).

    These are raised before anything changes. If memory ends half-way in place, every layer is plain or prepared, and
    another call prepares the rest.
    """
    checks.module("model", model)
    checks.boolean("inplace", inplace)
    if weights is not None:
        checks.one_of("weights", weights, QUANTIZATIONS)
    _check(model, weights)
    originals = {id(p): p for p in model.parameters() if not inplace}  # kept alive: ids of others come again
    if not inplace:
        model = copy.deepcopy(model, _deepcopy_memo(model))
    if _is_mlp(model):
        prepared = PreparedMLP(model, weights)
        if not inplace:
            _copy_parameters(prepared, originals)
        return prepared.requires_grad_(False)
    plain = _plain_experts(model).values()
    dense = _dense_mlps(model)
    if not plain and not dense and not any(isinstance(module, Prepared) for module in model.modules()):
        raise NothingToPrepare("the model has no sparse layer and no dense MLP to prepare (docs/index.md lists them)")
    for experts in plain:
        _PREPARED[_base(experts)].prepare(experts, weights)
    for mlp in dense:
        mlp.replace(PreparedMLP(mlp.module, weights))
    for block in _blocks(model):
        if weights is not None or any(isinstance(part, Prepared) for part in block.modules()):
            _prepare_attention(block, weights)
    if not inplace:
        _copy_parameters(model, originals)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if not isinstance(model, SparseMoE):
        from .padding_aware import make_padding_aware  # imports open_clip, which SparseMoE does not need

        make_padding_aware(model)
    return model


def _copy_parameters(model: nn.Module, originals: dict[int, nn.Parameter]) -> None:
    """Clones the parameters that a copied model still shares with its original: those excluded from the deepcopy that
    are also used outside of prepared layers."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in originals:
                copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                module._parameters[name] = copies[id(parameter)]


def _check(model: nn.Module, weights: str | None) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    if devices:
        raise ValueError(f"the model is on {devices.pop()}, but it must be on the CPU; move it first: model.cpu()")
    for name, module in model.named_modules():
        if isinstance(module, Prepared) and module.quantize != weights:
            raise ValueError(
                f"{name or 'model'} was prepared with weights={module.quantize!r} before, and cannot be changed to "
                f"{weights!r}; prepare the plain model"
            )
        adapts = type(module).__module__.startswith("peft.") and isinstance(
            getattr(module, "base_layer", None), Experts
        )
        if adapts:
            raise TypeError(
                f"{name} is an adapter of PEFT, which changes the weights at every call; merge it before preparing: "
                "model.merge_and_unload()"
            )
    matrices: dict[nn.Module, list[torch.Tensor]] = {
        mlp.module: [t for name, t in mlp.dense.parameters().items() if name in MATRICES] for mlp in _dense_mlps(model)
    }
    for name, experts in _plain_experts(model).items():
        missing = [matrix for matrix in MATRICES if matrix not in experts._parameters]
        if missing:
            raise TypeError(
                f"{missing[0]} of {name or 'the layer'} is not a plain parameter (pruned or parametrized); make it one "
                "before preparing: torch.nn.utils.prune.remove, or parametrize.remove_parametrizations"
            )
        _check_kind(name, experts)
        matrices[experts] = [p for matrix in MATRICES if (p := experts._parameters[matrix]) is not None]
    for name, module in model.named_modules():
        try:
            for matrix in matrices.get(module, ()):
                pack_weight(matrix.detach()[..., :1, :], weights)  # one output: what is refused of it is of all
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{name or 'the model'} cannot be prepared: {error}") from error


def _check_kind(name: str, experts: Experts) -> None:
    """Refuses a layer that a prepared one would not compute."""
    base = _base(experts)
    if defined := _defined_beside(type(experts), base):
        raise TypeError(
            f"{name or 'model'} is a {type(experts).__qualname__}, which defines {', '.join(defined)}; a prepared "
            f"layer is a {base.__name__} without it, so it cannot be prepared"
        )
    if not _can_become(type(experts), _PREPARED[base]):
        raise TypeError(
            f"{name or 'model'} is a {type(experts).__qualname__}, which has other bases beside {base.__name__}, so it "
            f"cannot be prepared; load its weights into a {base.__name__} and prepare that"
        )
    if isinstance(experts, SparseMoE) and experts.shared is not None and not isinstance(experts.shared, SharedExpert):
        raise TypeError(
            f"the shared expert of {name or 'the layer'} is a {type(experts.shared).__qualname__}; only clipup's own "
            "SharedExpert can be prepared"
        )


def _base(experts: Experts) -> type[Experts]:
    return next(base for base in _PREPARED if isinstance(experts, base))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks that call their layers."""
    names = {name for family in FAMILIES for name in family.blocks}
    return [
        module
        for module in model.modules()
        if class_name(module) in names or any(isinstance(child, SparseMoE) for child in module.children())
        if not has_another_forward(module)  # which may read weights in place of a call
    ]


def _prepare_attention(module: nn.Module, weights: str | None) -> None:
    """Prepares self-attention in a block: ``nn.MultiheadAttention`` and the linear layers of ``ATTENTIONS``. What is
    or holds something else than its class says is left as it is; so is what no kernel here computes, since torch's
    products are faster than those of a fallback."""
    for name, child in list(module.named_children()):
        if isinstance(child, Prepared | SparseMoE) or has_another_forward(child):
            continue
        if isinstance(child, nn.Linear):
            if class_name(module) in ATTENTIONS and linear_can_be_prepared(child) and _is_packed(child.weight, weights):
                setattr(module, name, PreparedLinear(child, weights))
        elif class_name(child) not in ATTENTION_MODULES or not _attends_to_itself(module):
            _prepare_attention(child, weights)
        elif can_be_prepared(child) and _is_packed(cast(nn.Parameter, child.in_proj_weight), weights):
            setattr(module, name, prepared_attention(child, weights))


def _is_packed(weight: torch.Tensor, weights: str | None) -> bool:
    """Whether packed weights of its type are worth it: those of float16 are float32, twice as large."""
    known = (torch.float32, torch.bfloat16) if weights is None else (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype in known and packed_layout(weight.dtype, weights) != PLAIN_LAYOUT


def _attends_to_itself(block: nn.Module) -> bool:
    """Whether a block's attention gets one tensor, and its attention weights are not asked for."""
    kind = next(base for base in type(block).__mro__ if not base.__module__.startswith("clipup."))
    if f"{kind.__module__}.{kind.__qualname__}" not in SELF_ATTENTION_BLOCKS or hasattr(block, "ln_1_kv"):
        return False  # the latter is open_clip's cross-attention
    return "attention" not in vars(block) and ("attention" not in vars(kind) or was_defined_with(kind, "attention"))


def _can_become(kind: type, other: type) -> bool:
    """Whether Python lets an object change its class; bases such as ``Generic`` can give it another layout."""
    try:
        object.__setattr__(object.__new__(kind), "__class__", other)
    except TypeError:
        return False
    return True


def _defined_beside(layer_class: type, base: type) -> list[str]:
    """The functions and properties of a class and of those between it and ``base``, which would be lost."""
    between = layer_class.__mro__[: layer_class.__mro__.index(base)]
    own = [one for one in between if one.__module__.partition(".")[0] not in ("clipup", "typing", "abc")]
    return sorted(
        name
        for name, value in {name: value for one in own for name, value in vars(one).items()}.items()
        if (callable(value) or hasattr(type(value), "__get__")) and name not in _HARMLESS
    )


def _plain_experts(model: nn.Module) -> dict[str, Experts]:
    """The sparse layers and shared experts that are not prepared yet, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, SparseMoE | SharedExpert)}
    return {name: experts for name, experts in found.items() if not isinstance(experts, Prepared)}


def _deepcopy_memo(model: nn.Module) -> dict[int, object]:
    """A memo for deepcopy that excludes the weights to be packed: packing already copies them."""
    weights = [experts._parameters[name] for experts in _plain_experts(model).values() for name in MATRICES]
    mlps = [model] if _is_mlp(model) else [mlp.module for mlp in _dense_mlps(model)]
    for mlp in mlps:
        weights += mlp.parameters()
    return {id(weight): weight for weight in weights if weight is not None}


def _is_mlp(module: nn.Module) -> bool:
    try:
        return mlp_can_be_prepared(module, read_mlp(module))
    except TypeError:
        return False


def _dense_mlps(model: nn.Module) -> list[BlockMLP]:
    """The MLPs that ``PreparedMLP`` can replace in blocks that call their layers: those that are a single module."""
    found = []
    for block in itertools.filterfalse(has_another_forward, model.modules()):
        try:
            mlp = find_mlp(block)
        except TypeError:
            continue
        if len(mlp.family.parts) == 1 and mlp_can_be_prepared(mlp.module, mlp.dense):
            found.append(mlp)
    return found


def for_inference(model: nn.Module, precision: Precision = "fp32", weights: str | None = None) -> nn.Module:
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
