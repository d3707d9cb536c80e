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
from ..dense.expert_init import check_shards, experts_of, reinitialize_hidden_units
from ..dense.mlp_families import BlockMLP, find_mlp
from ..moe.config import MoEConfig
from ..moe.layer import SparseMoE
from ..moe.weight_decay import add_no_weight_decay


def make_sparse(model: nn.Module, config: MoEConfig, others: Sequence[Sequence[DenseMLP]] = ()) -> None:
    """Replaces the MLPs that the config selects. If an error is raised, the model is unchanged.

    Args:
        config: with towers that the model has.
        others: the same MLPs of other models, of which experts are made too.

    Raises:
        TypeError, ValueError: as ``upcycle``.
    """
    chosen = chosen_mlps(model, config)
    layers = [_sparse_layer(mlp, config) for mlp in chosen]
    for number, (mlp, layer) in enumerate(zip(chosen, layers, strict=True)):
        mlp.replace(layer)
        _mix_experts(layer, [mlp.dense, *(of_model[number] for of_model in others)], config)
    make_padding_aware(model, config.towers or ())
    add_no_weight_decay(model)
    model.moe_config = config  # type: ignore[assignment]  # nn.Module's stub has only tensors and modules


@torch.no_grad()
def _mix_experts(layer: nn.Module, mlps: Sequence[DenseMLP], config: MoEConfig) -> None:
    """Gives expert group g of a layer the MLP g modulo their number. The first one's are there already."""
    (sparse,) = (module for module in layer.modules() if isinstance(module, SparseMoE))
    for number, mlp in enumerate(mlps[1:], start=1):
        shards = experts_of(mlp, config.granularity, config.granularity)
        for group in range(number, config.num_experts // config.granularity, len(mlps)):
            at = slice(group * config.granularity, (group + 1) * config.granularity)
            values = {name: value.clone() for name, value in shards.items()}
            if config.reinit_ratio > 0:
                reinitialize_hidden_units(values, config.reinit_ratio)
            for name, value in values.items():
                sparse.get_parameter(name)[at] = value.to(sparse.get_parameter(name))


def chosen_mlps(model: nn.Module, config: MoEConfig) -> list[BlockMLP]:
    """The MLPs of the blocks that become sparse. Raises unless every one can be read and split."""
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
    outside = [index for index in config.blocks if not -depth <= index < depth]
    if outside:
        raise ValueError(
            f"blocks names {outside}, but the {tower} tower has {depth} blocks (0 to {depth - 1}); name some of these"
        )
    indices = [index % depth for index in config.blocks]
    if len(set(indices)) < len(indices):
        raise ValueError(f"blocks={config.blocks} names a block of the {tower} tower ({depth} blocks) twice")
    return sorted(indices)


def _sparse_layer(mlp: BlockMLP, config: MoEConfig) -> nn.Module:
    """The replacement of an MLP: a sparse layer, after the MLP's input norm if it has one."""
    dense = dataclasses.replace(mlp.dense, input_norm=None)
    layer = SparseMoE.from_dense(dense, config).train(mlp.module.training)
    if mlp.dense.input_norm is None:
        return layer
    return nn.Sequential(OrderedDict(norm=mlp.dense.input_norm, moe=layer)).train(mlp.module.training)
