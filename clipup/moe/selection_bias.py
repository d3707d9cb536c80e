"""Loss-free balancing: a bias that affects expert selection but not the gates, updated by the load after every step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layer import moe_layers


def sign_step(load: Tensor) -> Tensor:
    """sign(mean(c) - c_e): up for experts below the mean load, down for those above (loss-free balancing, arXiv
    2408.15664, algorithm 1). load: c, [E] tokens per expert -> [E]."""
    return torch.sign(load.mean() - load)


def z_score_step(load: Tensor) -> Tensor:
    """-(c_e - mean(c)) / std(c), 0 for equal loads (z-score balancing, arXiv 2608.17402); the standard deviation of the
    E experts without Bessel's correction. load: c, [E] -> [E]."""
    deviation = load.mean() - load
    return deviation / load.std(correction=0).clamp_min(torch.finfo(load.dtype).tiny)


_STEPS = {"sign": sign_step, "z_score": z_score_step}


@torch.no_grad()
def update_selection_bias(model: nn.Module) -> None:
    """Updates every sparse layer's selection bias by ``selection_bias_rate`` times the step of its kind. Call it after
    every optimizer step; ``clipup train`` does.

    The load covers all forward passes in training with gradients since the last call, in all threads, before dropping,
    so the micro-batches of an accumulated step count together; the recomputation of activation checkpointing does not
    count. With ``torch.distributed`` the loads of all ranks are summed, so all ranks must call. The host does not
    synchronize with the device. A model without such layers is left unchanged, and so are layers with a locked router
    (``requires_grad=False``).
    """
    loads = {layer: layer.state.take_load() for layer in moe_layers(model).values()}
    biased = [(layer, layer.router.selection_bias) for layer in loads if layer.router.weight.requires_grad]
    counted = [
        (layer, bias, torch.zeros_like(bias, dtype=torch.int64) if (load := loads[layer]) is None else load)
        for layer, bias in biased
        if bias is not None
    ]
    if not counted:
        return
    joined = torch.cat([load.to(counted[0][1].device) for _, _, load in counted])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined)
    for (layer, bias, _), load in zip(counted, joined.split([bias.numel() for _, bias, _ in counted]), strict=True):
        # assign=True, and FSDP1's buffer_dtype, may have narrowed it
        bias = layer.router.selection_bias = bias.float()
        step = _STEPS[layer.config.selection_bias](load.to(bias.device, bias.dtype))
        bias.add_(step, alpha=layer.config.selection_bias_rate)


def forget_loads(model: nn.Module) -> None:
    """Discards the load of a step that was not applied; call it instead of ``update_selection_bias``."""
    for layer in moe_layers(model).values():
        layer.state.take_load()
