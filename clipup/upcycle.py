"""Upcycling: a dense CLIP becomes a sparse one that computes the same function (CLIP-UP, arXiv 2502.00965).

The MLP of some blocks becomes E copies of itself behind a fresh router. With normalised gates and nothing dropped the
sparse model's output is the dense model's; ``step0_difference`` measures it, and ``MoEConfig.keeps_function`` says for
which options that holds.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .config import MoEConfig, check_config
from .expert_init import check_shards
from .mlp_families import find_mlp, replace_mlp
from .moe import moe_layers
from .weight_decay import add_no_weight_decay


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
    chosen = _chosen_blocks(model, config)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = _chosen_blocks(model, config)
    layers = {name: _sparse_layer(block, config) for name, block in chosen.items()}
    for name, block in chosen.items():
        replace_mlp(block, layers[name])
    if "text" in config.towers:
        _leave_padding_out(model)
    add_no_weight_decay(model)
    model.moe_config = config
    return model


def _chosen_blocks(model: nn.Module, config: MoEConfig) -> dict[str, nn.Module]:
    """The blocks that become sparse, by name; refuses the model unless the MLP of each can be read."""
    from .towers import leave_dense, tower_blocks  # open_clip takes seconds to import, and SparseMoE does not need it

    chosen = {}
    for tower in config.towers:
        blocks = tower_blocks(model, tower)
        names = [list(blocks)[index] for index in chosen_indices(config, tower, len(blocks))]
        for name in names:
            try:
                check_shards(find_mlp(blocks[name]).dense, config.granularity)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}; {leave_dense(tower)}") from error
            chosen[name] = blocks[name]
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


def _sparse_layer(block: nn.Module, config: MoEConfig) -> nn.Module:
    """What takes the place of a block's MLP: a sparse layer, behind the MLP's own input norm where it has one."""
    from . import models

    mlp = find_mlp(block)
    dense = dataclasses.replace(mlp.dense, input_norm=None)
    layer = models.sparse_layer_class(block).from_dense(dense, config).train(mlp.module.training)
    if mlp.dense.input_norm is None:
        return layer
    return nn.Sequential(OrderedDict(norm=mlp.dense.input_norm, moe=layer)).train(mlp.module.training)


def _leave_padding_out(model: nn.Module) -> None:
    from .padding_aware import leave_padding_out

    leave_padding_out(model)


@torch.no_grad()
def step0_difference(
    dense: nn.Module, sparse: nn.Module, images: Tensor | None = None, texts: Tensor | None = None
) -> float:
    """Largest absolute difference between the two models' normalised features, in evaluation with nothing dropped.
    Features of a CoCa are also what its decoder says about every token.

    Args:
        dense, sparse: a model and what ``upcycle`` made of it; training mode and configs are as before afterwards.
        images: [B, 3, height, width]. texts: [B, context_length] token ids. When neither is given both are random, 8
            of each (of what the model takes).

    Returns:
        0 to rounding right after upcycling with normalised gates; features have length 1.
    """
    from . import models

    checks.module("dense", dense)
    checks.module("sparse", sparse)
    for name, inputs in (("images", images), ("texts", texts)):
        if inputs is not None:
            checks.tensor(name, inputs)
    if images is None and texts is None:
        images, texts = models.random_inputs(dense, batch_size=8)
    with evaluating(dense), evaluating(sparse):
        pairs = zip(_features(sparse, images, texts), _features(dense, images, texts), strict=True)
        differences = [(ours - theirs).abs().max() for ours, theirs in pairs]
    return torch.stack(differences).max().item()  # NaN where any is


def _features(model: nn.Module, images: Tensor | None, texts: Tensor | None) -> Iterator[Tensor]:
    """All that a model computes from the inputs, of length 1 along the last axis, on the CPU."""
    from . import models

    device = next(model.parameters()).device
    encode = models.encoders(model)
    if images is not None:
        yield F.normalize(encode["image"](images.to(device)).float(), dim=-1).cpu()
    if texts is not None:
        yield F.normalize(encode["text"](texts.to(device)).float(), dim=-1).cpu()
    if images is not None and texts is not None and hasattr(model, "text_decoder"):
        yield F.normalize(model(images.to(device), texts.to(device))["logits"].float(), dim=-1).cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
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
