"""The state of a model and its optimizer, whole and independent of how they are spread over ranks.

So a checkpoint fits one process, any number of ranks, and open_clip: a state dict of plain tensors, and the state dict
of one optimizer over ``groups_of``, whose groups name their parameters in ``param_names``. The functions that gather
are collectives if the model is sharded; ranks other than the first need not keep what they gather.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import nn

from ...moe.expert_parallel import is_distributed
from ...moe.weight_decay import parameter_groups

_GROUP = "group"
"""Key, in a part of a parameter group, of the group's index. Checkpoints do not contain it."""
_OF_A_RUN = ("lr_scale", _GROUP)
"""Keys of a saved parameter group that a new run overwrites. Others, such as a step count, belong to the optimizer."""


def by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in parts whose parameters lie on one mesh, as torch's optimizers require. Groups of plain
    parameters are returned as they are."""
    if not any(is_distributed(parameter) for group in groups for parameter in group["params"]):
        return groups
    parts: dict[tuple[int, Any], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            mesh = parameter.device_mesh if is_distributed(parameter) else None
            part = parts.setdefault((index, mesh), {**group, "params": [], "param_names": [], _GROUP: index})
            part["params"].append(parameter)
            part["param_names"].append(name)
    return list(parts.values())


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads plain tensors of the whole model's shapes."""
    own = model.state_dict()
    model.load_state_dict({name: shard_like(own[name], value) for name, value in state.items()})


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` over the groups that ``by_mesh`` was given; its tensors are those of the optimizer."""
    own = optimizer.state_dict()
    values = by_name(own)
    order = {name: position for position, (name, _) in enumerate(model.named_parameters())}
    groups: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(own["param_groups"]):
        settings = {key: value for key, value in group.items() if key != _GROUP}
        whole = groups.setdefault(group.get(_GROUP, number), {**settings, "param_names": []})
        whole["param_names"] += group["param_names"]
    state: dict[int, Any] = {}
    numbers = count()
    for group in groups.values():
        group["param_names"].sort(key=order.__getitem__)
        numbered = dict(zip(group["param_names"], numbers, strict=False))
        group["params"] = list(numbered.values())
        state |= {number: values[name] for name, number in numbered.items() if name in values}
    return {**own, "state": state, "param_groups": list(groups.values())}


def by_name(optimizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an optimizer's state dict holds of each parameter, by its name."""
    return {
        name: optimizer["state"][index]
        for group in optimizer["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
        if index in optimizer["state"]
    }


def with_names(optimizer: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with ``param_names``. One without them, such as that of open_clip_train 3, is taken to
    be over ``clipup.parameter_groups`` of the model.

    Raises:
        ValueError: it has groups of other sizes.
    """
    saved = optimizer["param_groups"]
    if all("param_names" in group for group in saved):
        return optimizer
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [[name_of[parameter] for parameter in group["params"]] for group in parameter_groups(model, 0.0)]
    sizes = [len(group["params"]) for group in saved], [len(group) for group in names]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes[0]} parameters, this model's are of {sizes[1]}: other "
            "parameters were trained, or by another trainer than clipup or open_clip_train 3. To start from its "
            "weights alone, pass it as pretrained"
        )
    groups = [{**group, "param_names": of_group} for group, of_group in zip(saved, names, strict=True)]
    return {**optimizer, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Loads moments and step counts into a new optimizer, by the names of the parameters. Its groups keep their own
    settings, such as the learning rate, and have from a saved group with one of their parameters what they do not have
    yet, such as a count of steps. A parameter that the state does not have starts without moments.

    Args:
        state: as ``optimizer_state`` returns it, or without names.

    Raises:
        ValueError: a state without names has groups of other sizes.
    """
    state = with_names(state, model)
    values, own = by_name(state), optimizer.state_dict()
    states: dict[int, Any] = {}
    groups = []
    for group, live in zip(own["param_groups"], optimizer.param_groups, strict=True):
        names = group["param_names"]
        for name, index, parameter in zip(names, group["params"], live["params"], strict=True):
            if name in values:
                states[index] = {key: shard_like(parameter, value) for key, value in values[name].items()}
        saved = (each for each in state["param_groups"] if not set(names).isdisjoint(each["param_names"]))
        counted = {key: value for key, value in next(saved, {}).items() if key not in _OF_A_RUN}
        groups.append({**counted, **group})
    optimizer.load_state_dict({**state, "state": states, "param_groups": groups})
    _load_scalars(optimizer, states)


def _load_scalars(optimizer: torch.optim.Optimizer, states: dict[int, Any]) -> None:
    """Loads the scalars that an optimizer holds of every parameter, such as NAdam's product, again: torch has rounded
    all of them but ``step`` to the type of their parameters."""
    held = optimizer.state_dict()["state"]  # of a wrapper such as timm's Lookahead, the state that it steps with
    arrays = {key for state in states.values() for key, value in state.items() if getattr(value, "ndim", 1) > 0}
    for index, state in states.items():
        loaded = held[index]
        for key in state.keys() - arrays:  # a moment of a scalar parameter is none
            loaded[key] = state[key].to(loaded[key].device, copy=True)


def shard_like(model: Any, value: Any) -> Any:
    """A plain tensor spread like the DTensor ``model``, whose shape it has; each rank keeps its part of its own value,
    which is the same on all. Anything else as it is."""
    if not is_distributed(model) or is_distributed(value) or getattr(value, "shape", None) != model.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(model.device)
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


def gathered(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A state dict with its DTensors gathered, one after the other, into the CPU's memory; empty without ``keep``."""
    whole = {}
    for name, value in state.items():
        if is_distributed(value):
            value = value.to(value.device_mesh.device_type).full_tensor()  # shards may be offloaded to the CPU
            value = value.cpu() if keep else None
        if keep:
            whole[name] = value
    return whole
