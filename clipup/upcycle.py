"""Upcycling: a dense CLIP becomes a sparse one that computes the same function (CLIP-UP, arXiv 2502.00965).

The MLP of some blocks becomes E copies of itself behind a fresh router. With normalised gates and nothing dropped the
sparse model's output is the dense model's; ``step0_difference`` measures it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEConfig
from .mlp_families import read_block
from .moe import SparseMoE, moe_layers


def upcycle(model: nn.Module, config: MoEConfig | None = None, inplace: bool = False) -> nn.Module:
    """Makes an open_clip model sparse.

    Devices, types, requires_grad and training mode stay as they are; meta tensors work. The result carries the config
    as ``model.moe_config``. When anything is refused, the model is as it was.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, dense and not wrapped.
        config: what becomes sparse and how; None means ``MoEConfig.clip_up()``.
        inplace: change ``model`` itself instead of a copy.

    Raises:
        TypeError: a chosen block whose MLP is of no family that is read, by name, or no open_clip model.
        ValueError: the model is sparse already, or ``config.blocks`` names a block that is not there.
    """
    config = config if config is not None else MoEConfig.clip_up()
    already = list(moe_layers(model))
    if already:
        raise ValueError(f"the model is sparse already ({already[0]} and {len(already) - 1} more); upcycle a dense one")
    chosen = _chosen_blocks(model, config)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = _chosen_blocks(model, config)
    layers = {name: _sparse_layer(block, config) for name, block in chosen.items()}
    for name, block in chosen.items():
        block.mlp = layers[name]
    model.moe_config = config
    return model


def _chosen_blocks(model: nn.Module, config: MoEConfig) -> dict[str, nn.Module]:
    """The blocks that become sparse, by name; refuses the model unless the MLP of each can be read."""
    from . import models  # open_clip takes seconds to import, and SparseMoE alone does not need it

    chosen = {}
    for tower in config.towers:
        blocks = models.tower_blocks(model, tower)
        names = [list(blocks)[index] for index in _indices(config, tower, len(blocks))]
        for name in names:
            try:
                read_block(blocks[name])
            except TypeError as error:
                raise TypeError(f"{name}: {error}; {models.leave_dense(tower)}") from error
            chosen[name] = blocks[name]
    return chosen


def _indices(config: MoEConfig, tower: str, depth: int) -> list[int]:
    if config.blocks == "every_other":
        if depth < 2:
            raise ValueError(f"the {tower} tower has {depth} block, so blocks='every_other' chooses none; name indices")
        return list(range(1, depth, 2))
    outside = [index for index in config.blocks if not -depth <= index < depth]
    if outside:
        raise ValueError(f"blocks names {outside}, but the {tower} tower has {depth} blocks (0 to {depth - 1})")
    indices = [index % depth for index in config.blocks]
    if len(set(indices)) < len(indices):
        raise ValueError(f"blocks={config.blocks} names a block of the {tower} tower ({depth} blocks) twice")
    return sorted(indices)


def _sparse_layer(block: nn.Module, config: MoEConfig) -> SparseMoE:
    from . import models

    layer = models.sparse_layer_class(block).from_dense(read_block(block), config)
    return layer.train(block.mlp.training)


@torch.no_grad()
def step0_difference(
    dense: nn.Module, sparse: nn.Module, images: Tensor | None = None, texts: Tensor | None = None
) -> float:
    """Largest absolute difference between the two models' normalised features, in evaluation with nothing dropped.

    Args:
        dense, sparse: a model and what ``upcycle`` made of it; training mode and configs are as before afterwards.
        images: [B, 3, height, width]. texts: [B, context_length] token ids. When neither is given both are random, 8
            of each.

    Returns:
        0 to rounding right after upcycling with normalised gates; features have length 1.
    """
    from . import models

    if images is None and texts is None:
        images, texts = models.random_inputs(dense, batch_size=8)
    difference = 0.0
    with _evaluating(dense), _evaluating(sparse):
        for inputs, encoder in ((images, "encode_image"), (texts, "encode_text")):
            if inputs is not None:
                ours, theirs = (_features(getattr(model, encoder), model, inputs) for model in (sparse, dense))
                difference = max(difference, (ours - theirs).abs().max().item())
    return difference


def _features(encode: Callable[[Tensor], Tensor], model: nn.Module, inputs: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return F.normalize(encode(inputs.to(device)).float(), dim=-1).cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without capacity; everything is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {layer: layer.config for layer in moe_layers(model).values()}
    model.eval()
    for layer, config in configs.items():
        layer.config = config.replace(eval_capacity_factor=None)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, config in configs.items():
            layer.config = config
