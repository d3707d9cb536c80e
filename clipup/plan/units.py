"""Which parameters are gathered and reduced together, and what each rank holds of them.

The rules are those of ``clipup.train.parallel``; tests compare them with real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

from ..clip.towers import tower_blocks, towers
from ..moe.layer import moe_layers
from ..train.options import TrainOptions
from ..train.parallel import is_sharded


class Parameter(NamedTuple):
    """A parameter and how it is divided."""

    name: str
    shape: tuple[int, ...]
    """Of the part that a rank's experts have; all of it without expert parallelism."""
    bytes_each: int
    shards: int = 1
    axis: int = 0
    """Over which the shards divide it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def padded(self) -> int:
        """Elements of one shard, as FSDP2 allocates it: the axis is divided into equal parts, rounded up."""
        return self.numel if self.shards == 1 else self._rows * self.numel // self.shape[self.axis]

    @property
    def _rows(self) -> int:
        return -(-self.shape[self.axis] // self.shards)

    def held(self, shard: int) -> int:
        """Elements of a shard without padding; the last ones may have fewer, or none."""
        if self.shards == 1:
            return self.numel
        length = self.shape[self.axis]
        rows = max(0, min(self._rows, length - shard * self._rows))
        return rows * self.numel // length


class Unit(NamedTuple):
    """Parameters that are gathered and reduced with one collective."""

    kind: Literal["replicated", "scalars", "root", "block", "experts", "router"]
    parameters: tuple[Parameter, ...]
    shards: int
    """Ranks that share one copy of them."""
    stride: int
    """Ranks between two neighbors that share a copy."""
    replicas: int
    """Ranks that hold the same shard."""

    @property
    def bytes(self) -> int:
        """Of all shards together, with padding."""
        return self.shards * self.shard_bytes

    @property
    def shard_bytes(self) -> int:
        """Of one shard, with padding."""
        return sum(parameter.padded * parameter.bytes_each for parameter in self.parameters)

    def held_bytes(self, rank: int) -> int:
        """Of a rank's shard, without padding."""
        shard = rank // self.stride % self.shards
        return sum(parameter.held(shard) * parameter.bytes_each for parameter in self.parameters)


def units(model: nn.Module, options: TrainOptions, gpus: int) -> list[Unit]:
    """The units of a model, on any device, in which all parameters are trained."""
    if not is_sharded(options):
        parameters = tuple(_parameters(model.named_parameters(), 1))
        return [Unit("replicated", parameters, 1, 1, gpus)]
    ep = options.ep
    replicas = options.fsdp_replicas if options.fsdp else gpus // ep
    shards = gpus // (replicas * ep)
    dense_replicas, dense_shards = (replicas, shards * ep) if options.fsdp else (gpus, 1)
    taken: set[int] = set()
    found: list[Unit] = []

    def add(kind: str, module: nn.Module, scalars: bool = False) -> None:
        named = [(n, p) for n, p in module.named_parameters() if id(p) not in taken and (p.ndim == 0) == scalars]
        taken.update(id(parameter) for _, parameter in named)
        if not named:
            return
        if kind == "experts":
            own = tuple(_parameters(named, shards, axis=1, divided=ep))
            found.append(Unit("experts", own, shards, ep, replicas))
        elif scalars:
            found.append(Unit("scalars", tuple(_parameters(named, 1)), 1, 1, gpus))
        else:
            found.append(Unit(kind, tuple(_parameters(named, dense_shards)), dense_shards, 1, dense_replicas))  # type: ignore[arg-type]

    if ep > 1:
        for layer in moe_layers(model).values():
            for part in (layer.router, layer.shared):
                if part is not None:
                    add("router", part)
            add("experts", layer)
    for tower in towers(model):
        for block in tower_blocks(model, tower).values():
            add("block", block)
    add("scalars", model, scalars=True)
    add("root", model)
    return found


def _parameters(
    named: Iterator[tuple[str, nn.Parameter]] | list[tuple[str, nn.Parameter]],
    shards: int,
    axis: int = 0,
    divided: int = 1,
) -> Iterator[Parameter]:
    for name, parameter in named:
        shape = tuple(parameter.shape)
        if divided > 1:
            shape = (shape[0] // divided, *shape[1:])
        yield Parameter(name, shape, parameter.element_size(), shards, axis)
