"""Which layers of a model ``accelerate`` prepares, and as what; nothing here changes a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from clipup_kernels import packed_layout
from clipup_kernels.types import PLAIN_LAYOUT

from ..dense.dense_mlp import DenseMLP, class_name, library_class
from ..dense.mlp_families import find_mlp, read_mlp
from ..dense.mlp_readers import FAMILIES
from ..moe.experts import SharedExpert
from ..moe.layer import SparseMoE
from .prepared import Prepared, PreparedMLP, is_replaceable
from .prepared_attention import (
    ATTENTION_MODULES,
    ATTENTIONS,
    SELF_ATTENTION_BLOCKS,
    attention_class,
    can_be_prepared,
)
from .prepared_experts import (
    PreparedMoE,
    PreparedRoutedExperts,
    PreparedSharedExpert,
    is_routed_experts,
    routed_activation,
)
from .prepared_linear import (
    PATCH_EMBEDDINGS,
    PreparedLinear,
    PreparedPatches,
    linear_can_be_prepared,
    patches_can_be_prepared,
)
from .prepared_pair import PreparedIntermediate, PreparedOutputProjection

PREPARED_EXPERTS: dict[type[nn.Module], type[Prepared]] = {SparseMoE: PreparedMoE, SharedExpert: PreparedSharedExpert}
ONLY_IN_INT8 = "beside an MLP that is left, attention is prepared in int8 only"
_ADAPTERS = "it has PEFT's adapters; merge them first: model.merge_and_unload()"
_EXCLUDED = "excluded"
_HAS_OWN_PARTS = "hooks, a forward, tensors or parts of its own, or that it shares, would be lost"
_BLOCKS = {name for family in FAMILIES for name in family.blocks}
_MLPS = {name for family in FAMILIES for _, name in family.parts}


class Selection:
    """The plain layers of a model that can be prepared, and why others cannot.

    Args: as ``accelerate``.

    Raises:
        ValueError: a pattern of ``exclude`` matches no module's name.
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8.
    """

    chosen: dict[nn.Module, type[Prepared]]
    """The layers to prepare, with the class of their prepared layers. A shared layer is listed once."""
    left: dict[nn.Module, str]
    """Layers, or modules that contain layers, that stay plain, with the reason."""

    def __init__(self, model: nn.Module, weights: str | None, exclude: Iterable[str] = ()) -> None:
        self.model, self.weights, self._excluded = model, weights, _matching(model, exclude)
        self.chosen, self.left = {}, {}
        for module in model.modules():
            if type(module) in PREPARED_EXPERTS:
                self._decide({module: PREPARED_EXPERTS[type(module)]})
            elif is_routed_experts(module):
                self._decide({module: PreparedRoutedExperts}, _why_not(module))
        self._select_single(model)
        blocks = [
            module
            for module in model.modules()
            if library_class(module) in _BLOCKS or any(isinstance(child, SparseMoE) for child in module.children())
        ]
        # a block with a forward of its own may read weights directly instead of calling a layer
        self.left |= {block: _HAS_OWN_PARTS for block in blocks if "forward" in vars(block)}
        for block in (block for block in blocks if block not in self.left):
            self._select_mlp(block)
            parts = (part in self.chosen or isinstance(part, Prepared) for part in block.modules())
            self._select_attention(block, weights is not None or any(parts))
        sparse = any(isinstance(module, SparseMoE) for module in model.modules())
        for parent in model.modules():
            for child in parent.children():
                if sparse and type(child) is nn.Sequential and "forward" not in vars(parent):
                    self._select_single(child)
                elif class_name(parent) in PATCH_EMBEDDINGS and isinstance(child, nn.Conv2d):
                    fits = patches_can_be_prepared(child) and "forward" not in vars(parent)
                    self._choose(child, PreparedPatches, fits, child.weight)
                elif _is_layer(child) and child not in self.chosen:
                    place = f"it is in {class_name(parent)}, not in a supported block, attention or patch embedding"
                    self.left.setdefault(child, place)

    def _decide(self, layers: Mapping[nn.Module, type[Prepared]], reason: str | None = None) -> None:
        """Selects dependent layers together, or none: there may be a reason to leave them, or a layer or a linear layer
        in it is excluded."""
        parts = {part for layer in layers for part in layer.modules() if part is layer or _is_layer(part)}
        reason = _EXCLUDED if parts & self._excluded else reason
        if reason is None:
            self.chosen |= layers
        else:
            self.left |= dict.fromkeys(layers, reason)

    def _select_single(self, mlp: nn.Module) -> None:
        """Chooses a module that is an MLP, whatever it lies in. If it is left, its layers get the reason."""
        try:
            self._decide(_single(mlp, read_mlp(mlp)))
        except TypeError as error:
            if class_name(mlp) in _MLPS:
                self.left |= dict.fromkeys(filter(_is_layer, mlp.children()), _cause(error))

    def _select_mlp(self, block: Any) -> None:
        try:
            mlp = find_mlp(block)
            self._decide(self._pair(block) if mlp.family.passed else _single(mlp.module, mlp.dense))
            return
        except TypeError as error:
            reason = _cause(error)
        inner = dict(block.named_modules())
        paths = {path for family in FAMILIES if library_class(block) in family.blocks for path, _ in family.parts}
        for part in (inner[path] for path in paths & {*inner}):
            if any(map(_is_layer, part.modules())):
                self.left[part] = _ADAPTERS if any(map(has_adapters, part.modules())) else reason

    def _pair(self, block: Any) -> dict[nn.Module, type[Prepared]]:
        """The layers of a block's MLP of two modules. Raises ``TypeError`` if they cannot be prepared, also because one
        is used without the other, as a module that only some blocks share would be."""
        output = block.output
        layers = {block.intermediate: PreparedIntermediate, output.dense: PreparedOutputProjection}
        of_first, of_second, of_dense = (
            {holder for holder in self.model.modules() if part in holder.children()}
            for part in (block.intermediate, output, output.dense)
        )
        together = (
            of_first == of_second and of_dense == {output} and all(library_class(each) in _BLOCKS for each in of_first)
        )
        if not together or not all(is_replaceable(layer, kind.read(layer)) for layer, kind in layers.items()):
            raise TypeError(_HAS_OWN_PARTS)
        return layers

    def _select_attention(self, module: nn.Module, beside: bool) -> None:
        """Chooses self-attention in a block: ``nn.MultiheadAttention`` and the linear layers of ``ATTENTIONS``. Modules
        that are or hold something else than their class says are left, and so are those without a kernel here: torch's
        products are faster than a fallback's.

        Args:
            beside: whether attention is prepared there at all: with an MLP or experts, or in int8.
        """
        for child in (part for part in module.children() if part not in self.chosen and part not in self.left):
            if has_adapters(child) or "forward" in vars(child):
                self.left[child] = _ADAPTERS if has_adapters(child) else _HAS_OWN_PARTS
            elif isinstance(child, nn.Linear) and class_name(module) in ATTENTIONS:
                self._choose(child, PreparedLinear, linear_can_be_prepared(child), child.weight, beside)
            elif class_name(child) not in ATTENTION_MODULES:
                self._select_attention(child, beside)
            elif not _attends_to_itself(module):
                self.left[child] = f"{class_name(module)} may ask it for more than self-attention"
            else:
                self._choose(child, attention_class(child), can_be_prepared(child), child.in_proj_weight, beside)

    def _choose(self, layer: nn.Module, kind: type[Prepared], fits: bool, weight: Any, beside: bool = True) -> None:
        reason = _HAS_OWN_PARTS if not fits else None if beside else ONLY_IN_INT8
        if fits and not _is_packed(weight, self.weights):
            reason = f"packing its {weight.dtype} weights would gain nothing on this CPU"
        self._decide({layer: kind}, reason)


def _matching(model: nn.Module, patterns: Iterable[str]) -> set[nn.Module]:
    """The modules whose name matches a pattern, and all that lies in them. A shared module has several names."""
    matching: set[nn.Module] = set()
    for pattern in patterns:
        found = [part for name, part in model.named_modules(remove_duplicate=False) if fnmatch(name, pattern)]
        if not found:
            raise ValueError(
                f"exclude has {pattern!r}, which matches no name of a module; it is a list of patterns, such as "
                "['visual.*'], of the names in model.named_modules()"
            )
        matching.update(part for module in found for part in module.modules())
    for name, part in model.named_modules():
        if part in matching and isinstance(part, Prepared):
            raise ValueError(f"exclude names {name}, which was prepared before; prepare the plain model")
    return matching


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is a layer with PEFT's adapters around it."""
    return type(module).__module__.startswith("peft.") and "base_layer" in module._modules


def _single(mlp: nn.Module, dense: DenseMLP) -> dict[nn.Module, type[Prepared]]:
    """The layer of an MLP of one module, which was read as ``dense``. Raises ``TypeError`` unless ``PreparedMLP``
    computes and stores all that it does."""
    if dense.ln_weight is not None:
        raise TypeError("a norm between its projections is not supported")
    norm = {} if dense.input_norm is None else dict(dense.input_norm.named_parameters())
    if not is_replaceable(mlp, {**dense.parameters(), **norm}):
        raise TypeError(_HAS_OWN_PARTS)
    return {mlp: PreparedMLP}


def _why_not(experts: nn.Module) -> str | None:
    """Why ``PreparedRoutedExperts`` does not compute or store all that experts do; None if it does."""
    try:
        routed_activation(experts)
    except NotImplementedError as error:
        return _cause(error)
    is_own = hasattr(type(experts).forward, "__wrapped__")  # by transformers' decorator; a derived class may lack it
    return None if is_own and is_replaceable(experts, PreparedRoutedExperts.read(experts)) else _HAS_OWN_PARTS


def _cause(error: Exception) -> str:
    return str(error).split("; ")[0]  # then comes what upcycling could do


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or class_name(module) in ATTENTION_MODULES


def _is_packed(weight: torch.Tensor, weights: str | None) -> bool:
    """Whether packing gains speed for a weight's type. Packed float16 is float32, twice as large."""
    dtypes = (torch.float32, torch.bfloat16, *[torch.float16] * (weights is not None))
    return weight.dtype in dtypes and packed_layout(weight.dtype, weights) != PLAIN_LAYOUT


def _attends_to_itself(block: nn.Module) -> bool:
    """Whether a block's attention gets one tensor (``ln_1_kv`` is of cross-attention), and its attention weights are
    not asked for."""
    supported = library_class(block) in SELF_ATTENTION_BLOCKS
    return supported and not hasattr(block, "ln_1_kv") and "attention" not in vars(block)
