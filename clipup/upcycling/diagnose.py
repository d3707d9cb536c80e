"""``diagnose``: what ``upcycle`` would do with each block of a model, and why it would refuse the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ..clip.towers import tower_blocks, towers, with_towers
from ..dense.dense_mlp import DenseMLP
from ..dense.expert_init import check_shards
from ..dense.mlp_families import find_mlp
from ..moe.config import MoEConfig
from ..moe.layer import SparseMoE
from .sparse_blocks import chosen_indices

Norm = Literal["input", "hidden"]
Status = Literal["sparse", "dense", "refused", "already sparse"]


@dataclass(frozen=True)
class BlockReport:
    """A block, its MLP, and its status."""

    name: str
    """Full name of the block in the model."""
    block: str
    """Class of the block."""
    mlp: str | None
    """Class of the module that a sparse layer replaces; None if the MLP could not be read."""
    d_model: int | None = None
    """Model width (D)."""
    d_hidden: int | None = None
    """Hidden width (H)."""
    activation: str | None = None
    gated: bool = False
    norm: Norm | None = None
    """A norm inside the MLP: before the projections ("input") or between them ("hidden")."""
    status: Status = "dense"
    """"sparse" if upcycling makes it sparse; "refused" if it is selected, but its MLP could not be read."""


@dataclass(frozen=True)
class TowerReport:
    """The blocks of a tower in execution order."""

    tower: str
    blocks: list[BlockReport] = field(default_factory=list)
    refused: str | None = None
    """Why ``upcycle`` refuses the tower; None if it does not."""


def diagnose(model: nn.Module, config: MoEConfig) -> list[TowerReport]:
    """Reports on every tower of a model, also on those that the config leaves dense. The model is not run or changed.

    Raises:
        TypeError: not a CLIP, CoCa or timm model.
    """
    config = with_towers(config, model)
    return [_diagnose_tower(model, tower, config) for tower in towers(model)]


def _diagnose_tower(model: nn.Module, tower: str, config: MoEConfig) -> TowerReport:
    is_selected, refused, chosen = tower in (config.towers or ()), None, []
    try:
        blocks = tower_blocks(model, tower)
        chosen = chosen_indices(config, tower, len(blocks)) if is_selected else []
    except TypeError as error:
        return TowerReport(tower, refused=str(error) if is_selected else None)
    except ValueError as error:
        refused = str(error)
    reports = []
    for index, (name, block) in enumerate(blocks.items()):
        report, problem = _diagnose_block(name, block, index in chosen, config.granularity)
        reports.append(report)
        refused = refused or problem
    return TowerReport(tower, reports, refused)


def _diagnose_block(name: str, block: nn.Module, is_chosen: bool, granularity: int) -> tuple[BlockReport, str | None]:
    """The block's report, and why a selected block cannot be upcycled."""
    kind = type(block).__name__

    def report(mlp: nn.Module, parts: SparseMoE | DenseMLP, norm: Norm | None, status: Status) -> BlockReport:
        hidden, width = parts.in_weight.shape[-2:]
        norm = norm if parts.ln_weight is None else "hidden"
        gated = parts.gate_weight is not None
        return BlockReport(name, kind, type(mlp).__name__, width, hidden, parts.activation, gated, norm, status)

    layer = next((module for module in block.modules() if isinstance(module, SparseMoE)), None)
    if layer is not None:
        problem = f"{name} is already sparse; upcycle a dense model" if is_chosen else None
        return report(layer, layer, None, "already sparse"), problem
    try:
        block_mlp = find_mlp(block)
        check_shards(block_mlp.dense, granularity if is_chosen else 1)
    except (TypeError, ValueError) as error:
        unread = BlockReport(name, kind, None, status="refused" if is_chosen else "dense")
        return unread, f"{name}: {error}" if is_chosen else None
    norm: Norm | None = None if block_mlp.dense.input_norm is None else "input"
    return report(block_mlp.module, block_mlp.dense, norm, "sparse" if is_chosen else "dense"), None
