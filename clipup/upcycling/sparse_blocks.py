"""Replaces MLPs of a dense model by sparse layers: the part of ``upcycle`` that loading a sparse model shares."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from ..clip.padding_aware import make_padding_aware
from ..clip.towers import leave_dense, tower_blocks
from ..dense.dense_mlp import DenseMLP
from ..dense.expert_init import check_shards, experts_of
from ..dense.mlp_families import BlockMLP, find_mlp
from ..moe.config import MoEConfig
from ..moe.layer import SparseMoE
from ..moe.weight_decay import add_no_weight_decay


def make_sparse(model: nn.Module, config: MoEConfig, others: Sequence[Sequence[DenseMLP]] = ()) -> None:
    """Replaces the MLPs that the config selects. If an error is raised, the model is unchanged.

    Args:
        config: with towers that the model has.
        others: for each further model, its MLPs of the same blocks; experts are made of these too.

    Raises:
        TypeError, ValueError: as ``upcycle``.
    """
    chosen = chosen_mlps(model, config)
    plain = [dataclasses.replace(mlp.dense, input_norm=None) for mlp in chosen]
    layers = [SparseMoE.from_dense(dense, config) for dense in plain]
    for mlp, layer, *same_place in zip(chosen, layers, *others, strict=True):
        _set_other_experts(layer, same_place)
        norm = mlp.dense.input_norm
        part = layer if norm is None else nn.Sequential(OrderedDict(norm=norm, moe=layer))
        mlp.replace(part.train(mlp.module.training))
    make_padding_aware(model, config.towers or ())
    add_no_weight_decay(model)
    model.moe_config = config  # type: ignore[assignment]  # nn.Module's stub has only tensors and modules


@torch.no_grad()
def _set_other_experts(layer: SparseMoE, mlps: Sequence[DenseMLP]) -> None:
    """Makes expert group g, of a layer made from model 0, from the MLP of model g modulo their number. ``mlps``: those
    of the models from 1 on."""
    config = layer.config
    for number, mlp in enumerate(mlps, start=1):
        for group in range(number, config.num_experts // config.granularity, len(mlps) + 1):
            at = slice(group * config.granularity, (group + 1) * config.granularity)
            experts = experts_of(mlp, config.granularity, config.granularity, config.reinit_ratio)
            for name, value in experts.items():
                layer.get_parameter(name)[at] = value.to(layer.get_parameter(name))


def chosen_mlps(model: nn.Module, config: MoEConfig) -> list[BlockMLP]:
    """The MLPs of the blocks that become sparse. Raises unless every MLP can be read and split."""
    chosen = []
    for tower in config.towers or ():
        blocks = tower_blocks(model, tower)
        names = [list(blocks)[index] for index in chosen_indices(config, tower, len(blocks))]
        for name in names:
            try:
                mlp = find_mlp(blocks[name])
                check_shards(mlp.dense, config.granularity)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}{leave_dense(model, tower)}") from error
            chosen.append(mlp)
    return chosen


def chosen_indices(config: MoEConfig, tower: str, depth: int) -> list[int]:
    """Which of a tower's ``depth`` blocks become sparse. Raises ``ValueError`` for indices out of range."""
    if isinstance(config.blocks, str):
        chosen = list(range(depth) if config.blocks == "every" else range(1, depth, 2))
        if not chosen:
            raise ValueError(f"the {tower} tower has {depth} block, so blocks='every_other' selects none; pass indices")
        last = config.last_blocks or len(chosen)
        if last > len(chosen):
            raise ValueError(
                f"last_blocks is {last}, but blocks={config.blocks!r} selects {len(chosen)} of the {tower} tower's "
                f"{depth} blocks; lower it, or select every block"
            )
        return chosen[-last:]
    if outside := [index for index in config.blocks if not -depth <= index < depth]:
        raise ValueError(
            f"blocks names {outside}, but the {tower} tower has {depth} blocks (0 to {depth - 1}); name some of these"
        )
    indices = [index % depth for index in config.blocks]
    if len(set(indices)) < len(indices):
        raise ValueError(f"blocks={config.blocks} names a block of the {tower} tower ({depth} blocks) twice")
    return sorted(indices)
