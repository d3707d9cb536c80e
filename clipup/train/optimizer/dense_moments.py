"""Upcycling the optimizer state of a dense run for the sparse model (Sparse Upcycling, arXiv 2212.05055)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.config import MoEConfig
from ...moe.layer import moe_layers
from ...upcycling.upcycle import upcycle
from ..parallel.whole_state import by_name, with_names

_MOMENTS = ("exp_avg", "exp_avg_sq")
OptimizerState = dict[str, dict[str, Tensor]]
"""AdamW's state per parameter, by the parameter's name in the model."""


def named_state(model: nn.Module, optimizer: dict[str, Any], source: str) -> OptimizerState:
    """The state of an AdamW over open_clip's parameter groups, by name.

    Args:
        model: the dense model that was trained.
        optimizer: ``state_dict()`` of its optimizer, with or without ``param_names``.
        source: its name in messages.

    Raises:
        ValueError: it is the state of another model, or not of an AdamW.
    """
    values = by_name(with_names(optimizer, model))
    state = {name: values[name] for name, _ in model.named_parameters() if values.get(name)}  # others had no gradient
    for held in state.values():
        if not held.keys() >= {"step", *_MOMENTS}:
            raise ValueError(f"the optimizer of {source} is not an AdamW: it holds {', '.join(held)}")
    return state


def upcycled_state(dense: nn.Module, config: MoEConfig, state: OptimizerState) -> OptimizerState:
    """The optimizer state of the model that ``upcycle(dense, config)`` returns: every parameter gets the moments of the
    parameter that it was copied from, the same in every expert. Routers are new and have no moments.

    The moments are upcycled like weights, as the parameters of a copy of the model. One thing differs: where experts
    are shards of an MLP, each has a part of the output bias, but its whole gradient.

    Raises:
        ValueError: ``config.reinit_ratio`` re-initializes weights, which the dense moments do not belong to.
    """
    if config.reinit_ratio > 0:
        raise ValueError(
            f"reinit_ratio={config.reinit_ratio} re-initializes weights, so that the dense optimizer's moments do not "
            "belong to them; use reinit_ratio 0 or leave resume_dense out"
        )
    result: OptimizerState = {}
    never_trained = {name for name, _ in dense.named_parameters()} - set(state)
    for key in _MOMENTS:
        moments = copy.deepcopy(dense)
        with torch.no_grad():
            for name, parameter in moments.named_parameters():
                parameter.copy_(state[name][key] if name in state else torch.zeros_like(parameter))
        upcycle(moments, config, inplace=True)
        for layer in moe_layers(moments).values():
            if layer.out_bias is not None:
                layer.out_bias.detach().mul_(config.granularity)
        without = {f"{name}.router.weight" for name in moe_layers(moments)} | never_trained
        for name, parameter in moments.named_parameters():
            if name not in without and parameter.requires_grad:
                result.setdefault(name, {})[key] = parameter.detach()
    steps = max((values["step"] for values in state.values()), default=torch.zeros(()))
    for values in result.values():
        values["step"] = steps.clone()
    return result
