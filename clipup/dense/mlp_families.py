"""Families of dense MLPs: which blocks have an MLP that can become experts, and where its parts are.

A family is matched on the exact classes of the block and of its MLP, by their full names, never on attribute names: a
subclass or a look-alike may compute something else. Matching by name also avoids importing open_clip, timm and
transformers for users of ``SparseMoE`` in other models.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .dense_mlp import DenseMLP, class_name, library_class, refuse_changed
from .mlp_readers import ANY_OTHER, FAMILIES, Family


class BlockMLP(NamedTuple):
    """The MLP of a block."""

    block: nn.Module
    family: Family
    dense: DenseMLP
    module: nn.Module
    """The module that a sparse layer replaces."""

    def replace(self, layer: nn.Module) -> None:
        """Replaces the MLP by ``layer``."""
        self.block.set_submodule(self.family.parts[0][0], layer)
        for path in self.family.passed:
            self.block.set_submodule(path, nn.Identity())


def find_mlp(block: nn.Module) -> BlockMLP:
    """Finds and reads the MLP of a transformer block.

    Raises:
        TypeError: the class of the block or of a part of its MLP belongs to no family, or the MLP has an unsupported
            part (an unknown activation, a norm other than layer norm); the message names it.
    """
    inner = dict(block.named_modules())
    for family in (family for family in FAMILIES if library_class(block) in family.blocks):
        modules = [inner[path] for path, _ in family.parts if path in inner]
        if [class_name(module) for module in modules] == [name for _, name in family.parts]:
            dense = family.read(*modules)
            refuse_changed(*modules)
            return BlockMLP(block, family, dense, modules[0])
    inside = f" with an mlp of class {class_name(inner['mlp'])}" if "mlp" in inner else ""
    raise TypeError(f"cannot read the MLP of a {class_name(block)}{inside}; {ANY_OTHER}")


def read_mlp(*parts: nn.Module) -> DenseMLP:
    """Reads a dense MLP that is a single module, or two, such as BERT's intermediate and output.

    Raises:
        TypeError: as ``find_mlp``.
    """
    names = [class_name(part) for part in parts]
    for family in FAMILIES:
        if names == [name for _, name in family.parts]:
            dense = family.read(*parts)
            refuse_changed(*parts)
            return dense
    raise TypeError(f"cannot read {' and '.join(names) or 'nothing'} as an MLP; {ANY_OTHER}")
