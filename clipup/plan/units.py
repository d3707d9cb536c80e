"""Which parameters are gathered and reduced together, and what each rank holds of them.

The rules are those of ``clipup.train.parallel.sharding``; tests compare them with real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import nn

from ..clip.towers import towers
from ..moe.layer import moe_layers
from ..moe.router import Router
from ..precision import Precision
from ..train.parallel.sharding import blocks_of, replicated_parameters
from ..train.train_options import TrainOptions


class Parameter(NamedTuple):
    """A parameter and how it is divided."""

    name: str
    shape: tuple[int, ...]
    """The shape of the part that a rank's experts have; of the whole without expert parallelism."""
    bytes_each: int
    shards: int = 1
    axis: int = 0
    """The axis that the shards divide."""
    trained: bool = True
    """Whether it has a gradient and moments."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def padded(self) -> int:
        """Elements of one shard, as FSDP2 allocates it: the axis is divided into equal parts, rounded up. The first
        rank uses all of its part."""
        length = self.shape[self.axis] if self.shards > 1 else 1
        return -(-length // self.shards) * self.numel // length


Kind = Literal["replicated", "unsharded", "root", "block", "experts", "shared", "router"]
_IN_HALF: tuple[Kind, ...] = ("block", "experts", "shared")
"""Units that are gathered in bfloat16 with amp_bf16."""


class Unit(NamedTuple):
    """Parameters that are gathered and reduced with one collective."""

    kind: Kind
    parameters: tuple[Parameter, ...]
    shards: int
    """Ranks that share one copy of them."""
    stride: int
    """Ranks between two neighbors that share a copy."""
    replicas: int
    """Ranks that hold the same shard."""
    in_half: bool = False
    """Whether the parameters, in float32, are gathered in bfloat16."""

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 computes with a gathered copy of the parameters, even of a single shard."""
        return self.kind not in ("replicated", "unsharded")

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all shards together, with padding, in the type in which they are gathered."""
        return self.shards * self.shard_bytes // (2 if self.in_half else 1)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of the gradients, with padding. FSDP2 reduces in float32, DDP in the parameters' type."""
        return self.shards * self.reduced_shard_bytes

    @property
    def reduced_shard_bytes(self) -> int:
        """Bytes of one shard of the gradients."""
        return sum(4 * parameter.padded for parameter in self.trained) if self.fsdp else self.trained_bytes

    @property
    def trained(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.trained]

    @property
    def trained_bytes(self) -> int:
        """Bytes of one shard of the trained parameters, with padding."""
        return sum(parameter.padded * parameter.bytes_each for parameter in self.trained)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard, with padding."""
        return sum(parameter.padded * parameter.bytes_each for parameter in self.parameters)


def has_half_units(options: TrainOptions, precision: Precision) -> bool:
    """Whether blocks and experts are gathered in bfloat16."""
    return options.parallel.is_sharded and precision == "amp_bf16"


def parameters_of_half_units(model: nn.Module) -> set[int]:
    """The ids of the parameters that are then gathered in bfloat16: those of blocks, without routers and what is not
    sharded."""
    blocks = [block for tower in towers(model) for block in blocks_of(model, tower)]
    routers = {id(parameter) for router in _routers(model) for parameter in router.parameters()}
    whole = {id(parameter) for parameter in replicated_parameters(model).values()}
    return {id(parameter) for block in blocks for parameter in block.parameters()} - routers - whole


def units(model: nn.Module, options: TrainOptions, gpus: int, precision: Precision) -> list[Unit]:
    """The units of a model, on any device."""
    if not options.parallel.is_sharded:
        return [Unit("replicated", _parameters(model.named_parameters(), 1, "replicated"), 1, 1, gpus)]
    ep = options.parallel.ep
    replicas = options.parallel.fsdp_replicas if options.parallel.fsdp else gpus // ep
    shards = gpus // (replicas * ep)
    dense_replicas, dense_shards = (replicas, shards * ep) if options.parallel.fsdp else (gpus, 1)
    whole = replicated_parameters(model)
    taken = {id(parameter) for parameter in whole.values()}
    all_units = [Unit("unsharded", _parameters(whole.items(), 1, "unsharded"), 1, 1, gpus)]

    half = has_half_units(options, precision)

    def add(kind: Kind, module: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in taken]
        taken.update(id(parameter) for _, parameter in named)
        count, stride, copies = (shards, ep, replicas) if kind == "experts" else (dense_shards, 1, dense_replicas)
        if named:
            parameters = _parameters(named, count, kind, ep)
            all_units.append(Unit(kind, parameters, count, stride, copies, half and kind in _IN_HALF))

    if ep > 1 or half:
        for router in _routers(model):
            add("router", router)
    if ep > 1:
        for layer in moe_layers(model).values():
            if layer.shared is not None:
                add("shared", layer.shared)
            add("experts", layer)
    for tower in towers(model):
        for block in blocks_of(model, tower):
            add("block", block)
    add("root", model)
    return all_units


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _parameters(
    named: Iterable[tuple[str, nn.Parameter]], shards: int, kind: Kind, ep: int = 1
) -> tuple[Parameter, ...]:
    """The parameters of a unit. Those of experts are divided among ``ep`` ranks over the first axis, and sharded over
    the second; those of a block are, if the first is shorter than the number of shards, which divides the second.
    """
    parameters = []
    for name, parameter in named:
        shape = tuple(parameter.shape)
        axis = int(kind == "block" and len(shape) > 1 and shape[0] < shards and shape[1] % shards == 0)
        if kind == "experts":
            shape, axis = (shape[0] // ep, *shape[1:]), 1
        parameters.append(Parameter(name, shape, parameter.element_size(), shards, axis, parameter.requires_grad))
    return tuple(parameters)
