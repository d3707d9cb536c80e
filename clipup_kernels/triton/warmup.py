"""Compiling what a layer will launch before its first step: a cold kernel takes a second or more to compile."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import dispatch, expert_mlp, expert_mlp_backward, router_logits, topk_gating


def warmup(
    width: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    tokens: Iterable[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    activation: str = "gelu",
    bias: bool = True,
    gated: bool = False,
    training: bool = True,
) -> None:
    """Compiles routing and experts of one layer, by running them on zeros; Triton keeps the result on disk.

    Args:
        width, hidden, num_experts, top_k: D, H, E, K.
        tokens: values of T that will be seen; what differs by T is only whether experts have few, some or many rows.
        training: the backward pass too, with z kept and with z computed again.
    """

    def zeros(*size: int, wanted: bool = True, dtype: torch.dtype = dtype):
        return torch.zeros(size, dtype=dtype, device=device) if wanted else None

    in_weight, out_weight = zeros(num_experts, hidden, width), zeros(num_experts, width, hidden)
    in_bias, out_bias = zeros(num_experts, hidden, wanted=bias), zeros(num_experts, width, wanted=bias)
    gate_weight = zeros(num_experts, hidden, width, wanted=gated)
    gate_bias = zeros(num_experts, hidden, wanted=gated and bias)
    parameters = (in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    for num_tokens in tokens:
        x, router_weight = zeros(num_tokens, width), zeros(num_experts, width, dtype=torch.float32)
        logits = router_logits.router_logits(x, router_weight)
        gates, expert_indices, *_ = topk_gating.topk_gating(logits, top_k, True)
        routed = (x, gates, *dispatch.dispatch(expert_indices, num_experts), *parameters)
        y, z = expert_mlp.expert_mlp_forward(*routed, activation, False)
        if training:
            expert_mlp_backward.expert_mlp_backward(y, *routed, z, activation, [True] * 4)
            y, z = expert_mlp.expert_mlp_forward(*routed, activation, True)
            router_logits.router_logits_backward(logits, x, router_weight, None, [True, True])
            topk_gating.topk_gating_backward(logits, expert_indices, True, None, gates)
            expert_mlp_backward.expert_mlp_backward(y, *routed, z, activation, [True] * 4)
