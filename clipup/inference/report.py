"""What ``accelerate`` prepares in a model, and why it leaves the rest; nothing here changes a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipup_kernels import packed_layout
from clipup_kernels.types import PLAIN_LAYOUT

from .. import checks
from ..dense.dense_mlp import class_name, library_class
from ..dense.mlp_families import find_mlp, read_mlp
from ..dense.mlp_readers import FAMILIES
from ..moe.experts import SharedExpert
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
NOT_YET = "it can be prepared: clipup.accelerate(model)"
"""The reason for a layer that was put into the model after ``accelerate``."""
BESIDE = "beside an MLP that is left, attention is prepared in int8 only"
_ADAPTERS = "it has PEFT's adapters; merge them first: model.merge_and_unload()"
_LOST = "hooks, a forward, tensors or parts of its own would be lost"
_BLOCKS = {name for family in FAMILIES for name in family.blocks}


@dataclass(frozen=True)
class LayerReport:
    """A layer with matrices: prepared, or left and why."""

    name: str
    """Full name of the module in the model; empty for the model itself. A shared module has its first name."""
    layer: str
    """Class of the module."""
    weights: str | None
    """Type of the packed weights, such as "int8" or "bfloat16"; None if the layer was left as it is."""
    reason: str | None = None
    """Why it was left; None if it is prepared."""

    def __str__(self) -> str:
        return f"{self.name or 'model'}: {self.layer}, {self.weights or f'left: {self.reason}'}"


def accelerate_report(model: nn.Module) -> list[LayerReport]:
    """What ``clipup.accelerate`` made of each layer of a model, and why it left others, in the order of the modules.

    ``print(*clipup.accelerate_report(model), sep="\\n")`` shows it. It is read from the model as it is now, as
    ``clipup.moe_layers`` is: nothing is stored that a copy, a pickle or a layer replaced later could contradict, and
    ``accelerate`` returns the model alone. A layer that was put in afterwards is reported as one that can be prepared.

    Layers are experts, MLPs, attention, linear layers and convolutions. A module whose layers are left for one reason
    is one row. Embeddings, norms and parameters that a model multiplies itself (open_clip's ``text_projection``) are
    in no row.

    Raises:
        TypeError: ``model`` is not a module.
    """
    checks.module("model", model)
    weights = next((module.quantize for module in model.modules() if isinstance(module, Prepared)), None)
    return list(Selection(model, weights).rows())


class Selection:
    """The plain layers of a model, each once, wherever it is used.

    Args: as ``accelerate``.

    Raises:
        RuntimeError: ``weights`` is "int8", and no kernel here multiplies int8.
    """

    chosen: dict[nn.Module, type[Prepared]]
    """Those to prepare, and as what."""
    left: dict[nn.Module, str]
    """Why others are left: layers, or modules that hold some."""

    def __init__(self, model: nn.Module, weights: str | None) -> None:
        self.model, self.weights = model, weights
        self.chosen = {
            module: PREPARED_EXPERTS[type(module)] for module in model.modules() if type(module) in PREPARED_EXPERTS
        }
        with suppress(TypeError):  # the model is not an MLP
            if mlp_can_be_prepared(model, read_mlp(model)):
                self.chosen[model] = PreparedMLP
        blocks = [
            module
            for module in model.modules()
            if library_class(module) in _BLOCKS or any(isinstance(child, SparseMoE) for child in module.children())
        ]
        # a block with a forward of its own may read weights directly instead of calling a layer
        self.left = {block: _LOST for block in blocks if "forward" in vars(block)}
        for block in blocks:
            self._select_mlp(block)
        for block in (block for block in blocks if block not in self.left):
            parts = (part in self.chosen or isinstance(part, Prepared) for part in block.modules())
            self._select_attention(block, weights is not None or any(parts))
        for parent in model.modules():
            for child in parent.children():
                if class_name(parent) in PATCH_EMBEDDINGS and isinstance(child, nn.Conv2d):
                    fits = patches_can_be_prepared(child) and "forward" not in vars(parent)
                    self._choose(child, PreparedPatches, fits, child.weight)
                elif _is_layer(child) and child not in self.chosen:
                    place = f"{class_name(parent)} is not a supported block, attention or patch embedding"
                    self.left.setdefault(child, place)

    def rows(self) -> Iterator[LayerReport]:
        """The report."""
        inside: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            reason = NOT_YET if module in self.chosen else self.left.get(module)
            if isinstance(module, Prepared):
                yield LayerReport(
                    name, type(module).__name__, module.quantize or str(module.dtype).removeprefix("torch.")
                )
            elif reason and not name.startswith(inside):
                yield LayerReport(name, type(module).__name__, None, reason)
                inside = (*inside, f"{name}." if name else "")

    def _select_mlp(self, block: nn.Module) -> None:
        try:
            mlp = find_mlp(block)
            if block not in self.left and mlp_can_be_prepared(mlp.module, mlp.dense):
                self.chosen[mlp.module] = PreparedMLP
                return
            reason = (
                "MLPs of several modules, as BERT's, are not supported yet"
                if len(mlp.family.parts) > 1
                else "a norm between its projections is not supported"
                if mlp.dense.ln_weight is not None
                else _LOST
            )
        except TypeError as error:
            reason = str(error).split("; ")[0]  # then comes what upcycling could do
        inner = dict(block.named_modules())
        paths = {path for family in FAMILIES if library_class(block) in family.blocks for path, _ in family.parts}
        for part in (inner[path] for path in paths & {*inner}):
            if any(map(_is_layer, part.modules())):
                self.left[part] = _ADAPTERS if any(map(has_adapters, part.modules())) else reason

    def _select_attention(self, module: nn.Module, beside: bool) -> None:
        """Chooses self-attention in a block: ``nn.MultiheadAttention`` and the linear layers of ``ATTENTIONS``. Modules
        that are or hold something else than their class says are left, and so are those without a kernel here: torch's
        products are faster than a fallback's.

        Args:
            beside: whether attention is prepared there at all: with an MLP or experts, or in int8.
        """
        for child in (part for part in module.children() if part not in self.chosen and part not in self.left):
            if has_adapters(child) or "forward" in vars(child):
                self.left[child] = _ADAPTERS if has_adapters(child) else _LOST
            elif isinstance(child, nn.Linear) and class_name(module) in ATTENTIONS:
                self._choose(child, PreparedLinear, linear_can_be_prepared(child), child.weight, beside)
            elif class_name(child) not in ATTENTION_MODULES:
                self._select_attention(child, beside)
            elif not _attends_to_itself(module):
                self.left[child] = f"{class_name(module)} may ask it for more than self-attention"
            else:
                self._choose(child, attention_class(child), can_be_prepared(child), child.in_proj_weight, beside)

    def _choose(self, layer: nn.Module, kind: type[Prepared], fits: bool, weight: Any, beside: bool = True) -> None:
        if fits and not _is_packed(weight, self.weights):
            self.left[layer] = f"packing its {weight.dtype} weights would gain nothing on this CPU"
        elif fits and beside:
            self.chosen[layer] = kind
        else:
            self.left[layer] = BESIDE if fits else _LOST


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is a layer with PEFT's adapters around it."""
    return type(module).__module__.startswith("peft.") and "base_layer" in module._modules


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
