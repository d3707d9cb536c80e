"""The state of a model and its optimizer by names that do not depend on how it is spread over ranks.

Of the tensors, ``model.NAME`` are weights and buffers, ``optimizer.NAME.KEY`` the optimizer's of the parameter NAME.
What else the optimizer holds, such as counts of steps, is ``sharded_checkpoints.OptimizerValues``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.shard_files import MODEL, OPTIMIZER
from ...moe.expert_parallel import is_distributed
from ..optim import continued_groups
from ..ranks.whole_state import PLACE
from .sharded_checkpoints import OptimizerValues, is_plain


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Names by parameter. Call it before the first step: FSDP2 exchanges the parameters of modules meanwhile."""
    return {parameter: name for name, parameter in model.named_parameters()}


def all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """All tensors, which share the memory of the model and the optimizer."""
    found = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    for parameter, values in optimizer.state.items():
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        found |= {f"{OPTIMIZER}{names[parameter]}.{key}": value for key, value in tensors.items()}
    return found


def other_values(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> OptimizerValues:
    """What ``all_tensors`` leaves out, the same on all ranks."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", *PLACE)}
        groups.append({**settings, "param_names": [names[parameter] for parameter in group["params"]]})
    values = {
        names[parameter]: {key: value for key, value in held.items() if not isinstance(value, Tensor)}
        for parameter, held in optimizer.state.items()
    }
    return {"param_groups": groups, "values": {name: held for name, held in values.items() if held}}


def check_kinds(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> None:
    """
    Raises:
        ValueError: the state of a parameter holds something else than tensors and numbers.
    """
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not (isinstance(value, Tensor) or is_plain(value)):
                raise ValueError(
                    f"fsdp_checkpoint 'sharded' saves tensors and numbers, and {type(optimizer).__name__} keeps a "
                    f"{type(value).__name__} in {key!r} of {names[parameter]}; use fsdp_checkpoint 'full', or another "
                    "opt"
                )


def own_share(tensors: dict[str, Tensor], is_first: bool) -> dict[str, Tensor]:
    """Those tensors that this rank may have to write: of plain ones, which all ranks have, the first rank's count."""
    return {name: value for name, value in tensors.items() if is_first or is_distributed(value)}


def _check_alike(keys: dict[str, list[str]]) -> None:
    """Refuses a state in which some parameters lack what others have."""
    every = set().union(*keys.values())
    for name, found in keys.items():
        for missing in sorted(every - set(found)):
            raise ValueError(f"the checkpoint lacks {OPTIMIZER}{name}.{missing}, which other parameters have")


def targets(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    described: dict[str, Any],
    others: OptimizerValues,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to read a checkpoint into: all by name, and those of the optimizer also in its state dict, with the other
    values. Those of the model share its memory.

    Args:
        described: the checkpoint's tensors (``shard_files.described``).

    Raises:
        ValueError: a tensor of the optimizer is missing.
    """
    wanted = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    keys: dict[str, list[str]] = {}
    for name in described:
        if name.startswith(OPTIMIZER):
            parameter_name, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            keys.setdefault(parameter_name, []).append(key)
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.NAdam):  # others have other keys for some parameters
        _check_alike(keys)
    state: dict[int, dict[str, Any]] = {}
    for group, own in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        for parameter, number in zip(group["params"], own["params"], strict=True):
            values: dict[str, Any] = dict(others["values"].get(names[parameter], {}))
            for key in keys.get(names[parameter], ()):
                name = f"{OPTIMIZER}{names[parameter]}.{key}"
                size, dtype = described[name].size, described[name].properties.dtype
                like_parameter = key != "step" and size == parameter.shape
                values[key] = wanted[name] = (
                    torch.empty_like(parameter.detach()) if like_parameter else torch.empty(size, dtype=dtype)
                )
            if values:
                state[number] = values
    return wanted, {"state": state, "param_groups": continued_groups(optimizer, names, others["param_groups"])}
