"""The numbers of a logged step, read from the device in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.metrics import moe_metrics
from ..ranks.distributed import Ranks

Layers = dict[str, dict[str, Tensor]]
"""Metrics by layer and name."""


def routing_of(model: nn.Module) -> Layers:
    """What ``moe_metrics`` says of the last forward pass, except the choices of every token."""
    layers = moe_metrics(model)
    for values in layers.values():
        del values["expert_indices"]
    return layers


def mean_routing(batches: Sequence[Layers]) -> Layers:
    """The means of metrics over the batches of a step, one or more."""
    first = batches[0]
    return {
        name: {key: torch.stack([batch[name][key] for batch in batches]).mean(0) for key in values}
        for name, values in first.items()
    }


def step_record(scalars: dict[str, Tensor], layers: Layers, ranks: Ranks) -> dict[str, Any]:
    """Scalars and routing metrics as Python numbers, averaged over ranks.

    Returns:
        The scalars by name and, for a sparse model, the means of the layers' scalars over the layers, and under
        ``layers`` all metrics of each layer.
    """
    tensors = [*scalars.values(), *(tensor for values in layers.values() for tensor in values.values())]
    flat = torch.cat([tensor.detach().float().reshape(-1).to(ranks.device) for tensor in tensors])
    numbers = iter(ranks.mean(flat).tolist())

    def take(tensor: Tensor) -> Any:
        """A float, or the list of a vector's."""
        return [next(numbers) for _ in range(tensor.numel())] if tensor.dim() else next(numbers)

    record: dict[str, Any] = {name: take(tensor) for name, tensor in scalars.items()}
    read_layers = {name: {key: take(tensor) for key, tensor in values.items()} for name, values in layers.items()}
    if layers:
        for key in [key for key, tensor in next(iter(layers.values())).items() if not tensor.dim()]:
            record[key] = sum(values[key] for values in read_layers.values()) / len(read_layers)
        record["layers"] = read_layers
    return record
