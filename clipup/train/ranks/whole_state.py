"""The state of a model and its optimizer, whole and independent of how they are spread over ranks.

So a checkpoint fits one process, any number of ranks, and open_clip: a state dict of plain tensors, and the state dict
of one optimizer over ``parameter_groups``. The functions that gather are collectives if the model is sharded; ranks
other than the first need not keep what they gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...moe.expert_parallel import is_distributed

_GROUP, _POSITIONS = PLACE = "group", "positions"
"""Keys of a part of a parameter group: the group's index, and the positions of its parameters among all. They are of
this run's layout, and in no checkpoint."""


def by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in parts whose parameters lie on one mesh, as torch's optimizers require. Groups of plain
    parameters are returned as they are."""
    if not any(is_distributed(parameter) for group in groups for parameter in group["params"]):
        return groups
    parts: dict[tuple[int, Any], dict[str, Any]] = {}
    position = 0
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            mesh = parameter.device_mesh if is_distributed(parameter) else None
            part = parts.setdefault((index, mesh), {**group, "params": [], _GROUP: index, _POSITIONS: []})
            part["params"].append(parameter)
            part[_POSITIONS].append(position)
            position += 1
    return list(parts.values())


def weights(model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """``model.state_dict()`` of plain tensors; empty without ``keep``."""
    return _gathered(model.state_dict(), keep)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """``optimizer.state_dict()`` of plain tensors, over the groups that ``by_mesh`` was given."""
    own = optimizer.state_dict()
    if not _in_parts(optimizer):
        return own
    groups: dict[int, dict[str, Any]] = {}
    state = {}
    for group in own["param_groups"]:
        settings = {key: value for key, value in group.items() if key not in ("params", *PLACE)}
        groups.setdefault(group[_GROUP], {**settings, "params": []})["params"] += group[_POSITIONS]
        for index, position in zip(group["params"], group[_POSITIONS], strict=True):
            if index in own["state"]:
                state[position] = _gathered(own["state"][index], keep)
    for group in groups.values():
        group["params"].sort()
    return {**own, "state": dict(sorted(state.items())), "param_groups": [groups[index] for index in sorted(groups)]}


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads plain tensors of the whole model's shapes."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(own[name], value) for name, value in state.items()})


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in the groups that ``by_mesh`` was given."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    if not _in_parts(optimizer):
        return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    groups: dict[int, dict[int, str]] = {}
    for group in optimizer.param_groups:
        for parameter, position in zip(group["params"], group[_POSITIONS], strict=True):
            groups.setdefault(group[_GROUP], {})[position] = names[parameter]
    return [[name for _, name in sorted(groups[index].items())] for index in sorted(groups)]


def shard_like(model: Any, value: Any) -> Any:
    """A plain tensor spread like the DTensor ``model``, whose shape it has; each rank keeps its part of its own value,
    which is the same on all. Anything else as it is."""
    if not (is_distributed(model) and isinstance(value, Tensor) and value.shape == model.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(model.device)
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


def _gathered(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A state dict with its DTensors gathered, one after the other, into the CPU's memory."""
    whole = {}
    for name, value in state.items():
        if is_distributed(value):
            value = value.to(value.device_mesh.device_type).full_tensor()  # shards may be offloaded to the CPU
            value = value.cpu() if keep else None
        if keep:
            whole[name] = value
    return whole


def _in_parts(optimizer: torch.optim.Optimizer) -> bool:
    return any(_GROUP in group for group in optimizer.param_groups)
