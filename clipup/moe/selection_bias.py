"""Balance by a bias that only choosing sees, moved by the load after every step, in place of a loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layer import moe_layers


def sign_step(load: Tensor) -> Tensor:
    """sign(mean(c) - c_e): up for experts with less than the mean load, down for those with more (loss-free balancing,
    arXiv 2408.15664, algorithm 1). load: c, [E] tokens per expert -> [E]."""
    return torch.sign(load.mean() - load)


def z_score_step(load: Tensor) -> Tensor:
    """-(c_e - mean(c)) / std(c), 0 for equal loads (z-score balancing, arXiv 2608.17402); the standard deviation is
    that of the E experts as they are, without Bessel's correction. load: c, [E] -> [E]."""
    deviation = load.mean() - load
    return deviation / load.std(correction=0).clamp_min(torch.finfo(load.dtype).tiny)


_STEPS = {"sign": sign_step, "z_score": z_score_step}


@torch.no_grad()
def update_selection_bias(model: nn.Module) -> None:
    """Moves every sparse layer's selection bias by ``selection_bias_rate`` times the step of its kind. Call it after
    every optimizer step; ``clipup train`` does.

    The load is that of all forwards in training with gradients since the last call, in all threads, before dropping, so
    the micro-batches of an accumulated step count together; activation checkpointing's second forward does not count.
    Where ``torch.distributed`` runs, the loads of all ranks are summed, and all must call. Nothing waits for the
    device. A model without such layers stays as it is.
    """
    layers = [layer for layer in moe_layers(model).values() if layer.router.selection_bias is not None]
    if not layers:
        return
    loads = [_load(layer.records.take_load(), layer.router.selection_bias) for layer in layers]
    together = torch.cat([load.to(loads[0].device) for load in loads])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(together)
    for layer, load in zip(layers, together.split([load.numel() for load in loads]), strict=True):
        bias = layer.router.selection_bias
        step = _STEPS[layer.config.selection_bias](load.to(bias.device, bias.dtype))
        bias.add_(step, alpha=layer.config.selection_bias_rate)


def forget_loads(model: nn.Module) -> None:
    """Call it in place of ``update_selection_bias`` when a step was not applied: its load does not count."""
    for layer in moe_layers(model).values():
        layer.records.take_load()


def _load(load: Tensor | None, bias: Tensor) -> Tensor:
    return torch.zeros_like(bias, dtype=torch.int64) if load is None else load
