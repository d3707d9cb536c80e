"""An experts implementation for transformers' MoE models (Mixtral, Qwen-MoE, OLMoE and their relatives).

    import clipup_kernels.integrations.transformers
    model.set_experts_implementation("clipup")

Training and inference run on ``clipup_kernels.expert_glu``, on CPUs and CUDA devices; the model keeps its parameters as
they are.

Experts with biases, a transposed or interleaved weight, a norm after each expert or a gating of their own (GPT-OSS,
Llama 4 and others) are refused by name at the first forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from .. import dispatch, expert_glu, expert_mlp

NAME = "clipup"
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "silu": "silu",
}
"""The names of activations by those of torch's and transformers' classes and functions."""


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts of an MoE block compute, in the form that transformers' ``ExpertsInterface`` calls.

    Args:
        module: the experts, with ``gate_up_proj`` [E, 2H, D] or ``up_proj`` [E, H, D], and ``down_proj`` [E, D, H].
        hidden_states: [T, D].
        top_k_index: [T, K] of integers; with transformers' expert parallelism E and more for experts elsewhere.
        top_k_weights: [T, K].

    Returns:
        [T, D] of the type of ``hidden_states``.

    Raises:
        NotImplementedError: the experts have a part that ``expert_mlp`` does not compute; it is named.
    """
    activation = activation_of(module)
    both, out_weight = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    x = hidden_states.to(both.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, both, out_weight = x.to(dtype), both.to(dtype), out_weight.to(dtype)
    num_experts = both.shape[0]
    index = top_k_index.to(torch.int32)
    if module._is_expert_parallel:
        index = torch.where(index < num_experts, index, -1)
    with torch.autocast(x.device.type, enabled=False):
        plan = dispatch(index, num_experts)
        gates = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
        if module.has_gate:
            y = expert_glu(x, gates, plan, both, out_weight, activation)
        else:
            y = expert_mlp(x, gates, plan, both, None, out_weight, None, activation)
    return y.to(hidden_states.dtype)


def activation_of(module: Any) -> str:
    """The activation of experts.

    Raises:
        NotImplementedError: the experts have a part that ``expert_mlp`` does not compute; it is named.
    """
    own_gating = type(module)._apply_gate is not moe._default_apply_gate
    act_fn = getattr(module, "act_fn", None)
    unlike = {
        "biases": module.has_bias,
        "transposed weights": module.is_transposed,
        "interleaved weights of gate and projection": module.has_gate and not module.is_concatenated,
        "a norm after each expert": module.has_post_expert_norm,
        "a gating of their own": module.has_gate and own_gating,
    }
    act = getattr(act_fn, "__name__", type(act_fn).__name__)
    activation = _ACTIVATIONS.get(act)
    if act == "GELU" and isinstance(act_fn, nn.GELU):
        activation = {"none": "gelu", "tanh": "gelu_tanh"}[act_fn.approximate]
    if activation is None and not (module.has_gate and own_gating):
        unlike[f"the activation {act}"] = True
    if found := ", ".join(name for name, there in unlike.items() if there):
        raise NotImplementedError(
            f"the experts implementation {NAME!r} does not compute {type(module).__name__}, which has {found}; use "
            'another one: model.set_experts_implementation("grouped_mm")'
        )
    assert activation is not None
    return activation


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
