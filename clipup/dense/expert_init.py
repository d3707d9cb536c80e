"""Initialization of experts: copies or shards of a dense MLP, and re-initialized hidden units.

Axis legend: ``D`` model width, ``H`` hidden width of the dense MLP, ``E`` experts, ``G`` granularity: shards per MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense_mlp import DenseMLP

_HIDDEN_FIRST = ("in_weight", "in_bias", "gate_weight", "gate_bias")


def check_shards(dense: DenseMLP, granularity: int) -> None:
    """
    Raises:
        ValueError: the hidden width is not a multiple of the granularity.
        TypeError: the MLP normalizes its hidden units together, so a shard cannot be computed by itself.
    """
    hidden = dense.in_weight.shape[0]
    if hidden % granularity:
        raise ValueError(f"granularity is {granularity}, which does not divide the MLP's {hidden} hidden units")
    if granularity > 1 and dense.ln_weight is not None:
        raise TypeError(
            f"granularity is {granularity}, but a norm between the MLP's projections needs all of its hidden units; "
            "use granularity=1"
        )


def experts_of(dense: DenseMLP, num_experts: int, granularity: int = 1, reinit_ratio: float = 0.0) -> dict[str, Tensor]:
    """E initial experts: copies of the dense MLP (Sparse Upcycling, arXiv 2212.05055) or its shards, in which a
    fraction of the hidden units is re-initialized (``reinitialize_hidden_units``).

    Expert ``e*G + s`` holds hidden units ``s*H/G`` to ``(s+1)*H/G``, so G neighbors form one MLP (NVIDIA, arXiv
    2410.07524). The output bias is divided equally. The neighbors sum to the MLP:

        sum_s W_out[:, s] act(W_in[s] x + b_in[s]) + b_out / G  =  W_out act(W_in x + b_in) + b_out

    Returns:
        The parameters of ``Experts`` by name, each [E, ...]: copies on the MLP's device.

    Raises:
        TypeError, ValueError: as ``check_shards``.
    """
    check_shards(dense, granularity)
    parts = {}
    for name, tensor in dense.parameters().items():
        part = _shards(name, tensor.detach(), granularity)
        parts[name] = part.repeat(num_experts // granularity, *[1] * (part.dim() - 1))
    if reinit_ratio > 0:
        reinitialize_hidden_units(parts, reinit_ratio)
    return parts


def _shards(name: str, tensor: Tensor, granularity: int) -> Tensor:
    """[G, ...]: a dense MLP's parameter in G shards."""
    if granularity == 1:
        return tensor.unsqueeze(0)
    if name in _HIDDEN_FIRST:
        return tensor.unflatten(0, (granularity, -1))
    if name == "out_weight":
        return tensor.unflatten(1, (granularity, -1)).transpose(0, 1)
    return (tensor / granularity).expand(granularity, -1)


def reinitialize_hidden_units(experts: dict[str, Tensor], ratio: float) -> Tensor:
    """Drop-Upcycling (arXiv 2502.19261, section 3): every expert re-initializes a fraction of its hidden units, in
    place.

    For each expert ``round(ratio*H)`` units are chosen at random; their rows of W_in (and W_gate), their columns of
    W_out, and their hidden biases are drawn from a normal distribution with the mean and standard deviation of the
    values they replace, tensor by tensor. Everything else stays bitwise unchanged. Random numbers come from torch's
    default generator.

    Args:
        experts: the parameters of ``Experts`` by name, each [E, ...]. ratio: r, from 0 to 1.

    Returns:
        [E, round(ratio*H)] int64: the re-initialized units.
    """
    num_experts, hidden = experts["in_weight"].shape[:2]
    device = experts["in_weight"].device
    count = round(ratio * hidden)
    chosen = [torch.randperm(hidden, device=device)[:count] for _ in range(num_experts)]
    for name, stacked in experts.items():
        if count == 0 or name not in (*_HIDDEN_FIRST, "out_weight"):
            continue
        for tensor, units in zip(stacked, chosen, strict=True):
            by_unit = tensor.T if name == "out_weight" else tensor
            replaced = by_unit[units].to(torch.promote_types(tensor.dtype, torch.float32))
            std, mean = torch.std_mean(replaced, correction=0)
            by_unit[units] = (mean + std * torch.randn_like(replaced)).to(tensor.dtype)
    return torch.stack(chosen)
