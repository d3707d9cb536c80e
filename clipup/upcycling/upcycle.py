"""Upcycling: a dense CLIP becomes a sparse one that computes the same function (CLIP-UP, arXiv 2502.00965).

The MLP of some blocks becomes E copies of itself behind a fresh router. With normalised gates and nothing dropped the
sparse model's output is the dense model's; ``step0_difference`` measures it, and ``MoEConfig.keeps_function`` says for
which options that holds.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn

from .. import checks
from ..clip.padding_aware import leave_padding_out
from ..clip.towers import leave_dense, tower_blocks
from ..dense.mlp_families import BlockMLP, find_mlp
from ..moe.config import MoEConfig, check_config
from ..moe.expert_init import check_shards
from ..moe.layer import SparseMoE, moe_layers
from ..moe.weight_decay import add_no_weight_decay


def upcycle(model: nn.Module, config: MoEConfig | None = None, inplace: bool = False) -> nn.Module:
    """Makes an open_clip model sparse.

    Devices, types, requires_grad and training mode stay as they are; meta tensors work. The result carries the config
    as ``model.moe_config``. Its ``no_weight_decay()``, which timm's optimizers ask for, names the experts' biases and
    norms beside what the dense model's names. When anything is refused, the model is as it was.

    Args:
        model: open_clip's CLIP, CustomTextCLIP or CoCa, or a timm model (``towers=("image",)``), dense and not wrapped.
        config: what becomes sparse and how; None means ``MoEConfig.clip_up()``.
        inplace: change ``model`` itself instead of a copy.

    Raises:
        TypeError: no model of these, another wrong argument, or a chosen block whose MLP is of no family that is read;
            by name.
        ValueError: the model is sparse already, ``config.blocks`` names a block that is not there, or a hidden width
            is no multiple of ``config.granularity``.
    """
    config = config if config is not None else MoEConfig.clip_up()
    checks.module("model", model)
    check_config("config", config)
    checks.boolean("inplace", inplace)
    already = list(moe_layers(model))
    if already:
        raise ValueError(f"the model is sparse already ({already[0]} and {len(already) - 1} more); upcycle a dense one")
    chosen = _chosen_mlps(model, config)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = _chosen_mlps(model, config)
    layers = [_sparse_layer(mlp, config) for mlp in chosen]
    for mlp, layer in zip(chosen, layers, strict=True):
        mlp.replace(layer)
    if "text" in config.towers:
        leave_padding_out(model)
    add_no_weight_decay(model)
    model.moe_config = config
    return model


def _chosen_mlps(model: nn.Module, config: MoEConfig) -> list[BlockMLP]:
    """The MLPs of the blocks that become sparse; refuses the model unless every one can be read and split."""
    chosen = []
    for tower in config.towers:
        blocks = tower_blocks(model, tower)
        names = [list(blocks)[index] for index in chosen_indices(config, tower, len(blocks))]
        for name in names:
            try:
                mlp = find_mlp(blocks[name])
                check_shards(mlp.dense, config.granularity)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}; {leave_dense(tower)}") from error
            chosen.append(mlp)
    return chosen


def chosen_indices(config: MoEConfig, tower: str, depth: int) -> list[int]:
    """Which of a tower's ``depth`` blocks become sparse; raises ``ValueError`` for blocks that are not there."""
    if isinstance(config.blocks, str):
        chosen = list(range(depth) if config.blocks == "every" else range(1, depth, 2))
        if not chosen:
            raise ValueError(f"the {tower} tower has {depth} block, so blocks='every_other' chooses none; name indices")
        last = config.last_blocks or len(chosen)
        if last > len(chosen):
            raise ValueError(
                f"last_blocks is {last}, but blocks={config.blocks!r} chooses {len(chosen)} of the {tower} tower's "
                f"{depth} blocks; lower it, or choose every block"
            )
        return chosen[-last:]
    outside = [index for index in config.blocks if not -depth <= index < depth]
    if outside:
        raise ValueError(f"blocks names {outside}, but the {tower} tower has {depth} blocks (0 to {depth - 1})")
    indices = [index % depth for index in config.blocks]
    if len(set(indices)) < len(indices):
        raise ValueError(f"blocks={config.blocks} names a block of the {tower} tower ({depth} blocks) twice")
    return sorted(indices)


def _sparse_layer(mlp: BlockMLP, config: MoEConfig) -> nn.Module:
    """The replacement of an MLP: a sparse layer, behind the MLP's own input norm where it has one."""
    dense = dataclasses.replace(mlp.dense, input_norm=None)
    layer_class = BlockMoE if hasattr(mlp.block, "get_weight_dtype") else SparseMoE
    layer = layer_class.from_dense(dense, config).train(mlp.module.training)
    if mlp.dense.input_norm is None:
        return layer
    return nn.Sequential(OrderedDict(norm=mlp.dense.input_norm, moe=layer)).train(mlp.module.training)


class _Projection(NamedTuple):
    weight: Tensor


class BlockMoE(SparseMoE):
    """SparseMoE in a block of open_clip's own, which reads the tower's type from ``block.mlp.c_fc.weight.dtype``."""

    @property
    def c_fc(self) -> _Projection:
        return _Projection(self.in_weight)
