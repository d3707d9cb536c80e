"""Calls into the compiled extension on CUDA tensors: topk_gating and dispatch as CUDA C++ (csrc/moe_cuda.h).

Every function has the arguments of its op. They run only if ``CLIPUP_BACKEND=cpp_cuda`` is set, until they are measured
against Triton on a GPU (``benchmarks/gpu_stages.py``). Work is queued on torch's current stream; the host never waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import meta
from .cpp import _dense, address
from .extension import NATIVE


def _workspace(like: Tensor, num_bytes: int) -> Tensor:
    """Memory for one call: torch reuses it only for later work on the same stream."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream


def topk_gating(logits, k, renormalize, selection_bias=None, mask=None) -> tuple[Tensor, ...]:
    logits, selection_bias, mask = _dense(logits, selection_bias, mask)
    num_tokens, num_experts = logits.shape
    outputs = meta.topk_gating(logits, k, renormalize)
    workspace = _workspace(logits, NATIVE.cuda_topk_gating_workspace_bytes(num_tokens, num_experts, k))
    with torch.cuda.device_of(logits):
        NATIVE.cuda_topk_gating(
            address(logits), address(mask), address(selection_bias), num_tokens, num_experts, k, renormalize,
            *map(address, outputs), address(workspace), _stream(logits),
        )  # fmt: skip
    return outputs


def topk_gating_backward(
    logits, expert_indices, renormalize, mask=None, d_gates=None, d_top_prob=None, d_mean_probs=None, d_z_loss=None
) -> Tensor:
    logits, expert_indices, mask = _dense(logits, expert_indices, mask)
    gradients = _dense(d_gates, d_top_prob, d_mean_probs, d_z_loss)
    d_logits = torch.empty_like(logits)
    workspace = _workspace(logits, NATIVE.cuda_topk_gating_backward_workspace_bytes())
    with torch.cuda.device_of(logits):
        NATIVE.cuda_topk_gating_backward(
            address(logits), address(mask), address(expert_indices), *logits.shape, expert_indices.shape[1],
            renormalize, *map(address, gradients), address(d_logits), address(workspace), _stream(logits),
        )  # fmt: skip
    return d_logits


def dispatch(expert_indices, num_experts, capacity_factor=None, priority=None, mask=None) -> tuple[Tensor, ...]:
    """With ``priority`` torch sorts the tokens first, stably, NaN last."""
    expert_indices, mask = _dense(expert_indices, mask)
    order = None if priority is None else reference.serving_order(priority)
    outputs = meta.dispatch(expert_indices, num_experts)
    workspace = _workspace(expert_indices, NATIVE.cuda_dispatch_workspace_bytes(*expert_indices.shape, num_experts))
    with torch.cuda.device_of(expert_indices):
        NATIVE.cuda_dispatch(
            address(expert_indices), address(mask), address(order), *expert_indices.shape, num_experts,
            -1.0 if capacity_factor is None else capacity_factor, *map(address, outputs), address(workspace),
            _stream(expert_indices),
        )  # fmt: skip
    return outputs
