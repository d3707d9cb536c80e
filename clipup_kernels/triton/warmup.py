"""Compiling a layer's kernels before its first step: compiling one takes a second or more."""

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
    """Compiles the kernels of one layer by running them on zeros; Triton caches them on disk. Routing is compiled as
    ``MoEConfig.clip_up()`` has it, with and without a mask, of tokens in ``dtype`` and in float32; for training also
    with a capacity and with the gradients of the auxiliary losses.

    Args:
        width, hidden, num_experts, top_k: D, H, E, K.
        tokens: expected values of T; only the class of rows per expert (few, some, many) matters.
        training: also the backward pass, with z kept and with z recomputed.
    """

    def zeros(*size: int, wanted: bool = True, dtype: torch.dtype = dtype):
        return torch.zeros(size, dtype=dtype, device=device) if wanted else None

    in_weight, out_weight = zeros(num_experts, hidden, width), zeros(num_experts, width, hidden)
    in_bias, out_bias = zeros(num_experts, hidden, wanted=bias), zeros(num_experts, width, wanted=bias)
    gate_weight = zeros(num_experts, hidden, width, wanted=gated)
    gate_bias = zeros(num_experts, hidden, wanted=gated and bias)
    parameters = (in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)

    def route(x, router_weight, mask):
        logits = router_logits.router_logits(x, router_weight, mask)
        gates, expert_indices, _, mean_probs, z_loss, _ = topk_gating.topk_gating(logits, top_k, True, None, mask)
        plan = dispatch.dispatch(expert_indices, num_experts, None, None, mask)
        if training:
            dispatch.dispatch(expert_indices, num_experts, 1.0, None, mask)
            router_logits.router_logits_backward(logits, x, router_weight, mask, [True, True])
            for of_losses in ((None, None), (mean_probs, z_loss)):
                gradients = gates, None, *of_losses
                topk_gating.topk_gating_backward(logits, expert_indices, True, mask, *gradients)
        return gates, plan

    for num_tokens in tokens:
        x, router_weight = zeros(num_tokens, width), zeros(num_experts, width, dtype=torch.float32)
        mask = torch.ones(num_tokens, dtype=torch.bool, device=device)
        for tokens_of_router in (x.float(), x):  # under autocast a router may get float32
            route(tokens_of_router, router_weight, mask)
            gates, plan = route(tokens_of_router, router_weight, None)
        routed = (x, gates, *plan, *parameters)
        for keep_z in (False, True) if training else (False,):
            y, z = expert_mlp.expert_mlp_forward(*routed, activation, keep_z)
            if training:
                expert_mlp_backward.expert_mlp_backward(y, *routed, z, activation, [True] * 4)
