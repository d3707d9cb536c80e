"""Expert parallelism: each rank of a group holds some of the experts, and rows travel to the experts and back.

A layer is expert-parallel if its experts' parameters are DTensors sharded on their first axis, the experts, over one
dimension of a device mesh: nothing else says so. Each rank routes its own tokens to all E experts. Rows, sorted by
expert, go to the ranks of their experts with their gates; these compute ``gate * expert(x)`` with the same ops as a
layer on one process; and the results go back to be summed for each token.

Axis legend: ``T`` tokens and ``R = T*K`` rows of this rank, ``N`` rows that it receives, ``D`` model width, ``E``
experts, ``P`` ranks in the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipup_kernels import Plan, combine, dispatch, permute

Compute = Callable[[Tensor, Tensor, Plan], Tensor]
"""tokens [N, D], gates [N, 1], their plan over this rank's experts -> [N, D]."""


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor. (To import DTensor takes half a second, which users of a plain layer need not wait.)"""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def shard_of(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, which shares its memory; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local().detach() if is_distributed(tensor) else tensor


def local(tensor: Any) -> Any:
    """What a rank computes with: of a DTensor its shard of the experts (axis 0), whole in all other axes. Anything else
    as it is. Ranks that compute with the same part have tokens of their own, so its gradient is the sum of theirs."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    kept = [placement if placement.is_shard(0) else Replicate() for placement in tensor.placements]
    summed = [Partial() if placement.is_replicate() else placement for placement in kept]
    return tensor.redistribute(placements=kept).to_local(grad_placements=summed)


def whole(tensor: Any) -> Any:
    """All of a DTensor, on every rank; its gradient is the sum of theirs. Anything else as it is."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def group_of(weight: Any) -> dist.ProcessGroup | None:
    """The ranks over which a stacked weight's experts are sharded, over one dimension of the mesh; None if every rank
    has all of them.

    Raises:
        ValueError: they cannot be sharded evenly.
    """
    over = [i for i, placement in enumerate(getattr(weight, "placements", ())) if placement.is_shard(0)]
    if not over:
        return None
    (dimension,) = over
    ranks = weight.device_mesh.size(dimension)
    if weight.shape[0] % ranks:
        raise ValueError(f"{weight.shape[0]} experts cannot be sharded evenly over {ranks} ranks")
    return weight.device_mesh.get_group(dimension) if ranks > 1 else None


def computed_where_the_experts_are(
    tokens: Tensor, gates: Tensor, plan: Plan, group: dist.ProcessGroup, compute: Compute
) -> Tensor:
    """``y[t] = sum_k gates[t, k] * expert_k(tokens[t])`` with the experts of all ranks; a collective of the group.

    The host waits once for the device, for the number of rows that come from each rank. The gradient of an expert is
    the sum over the ranks of the group, as if each added its loss to the others'.

    Args:
        tokens: [T, D]; T may differ between ranks.
        gates: [T, K] float32.
        plan: of this rank's tokens over all E experts.

    Returns:
        [T, D], of the type that ``compute`` returns.
    """
    ranks = dist.get_world_size(group)
    per_expert = plan.offsets.diff()
    received = torch.empty_like(per_expert)
    dist.all_to_all_single(received, per_expert, group=group)
    of_source = received.view(ranks, -1)  # [P, E/P]: rows from each rank for each of this rank's experts
    sums = torch.stack([per_expert.view(ranks, -1).sum(1), of_source.sum(1)])
    sent, incoming = sums.tolist()

    count = sum(sent)
    rows = permute(tokens, plan)[:count]
    row_gates = gates.reshape(-1)[plan.choice_of_row[:count].long()]
    rows = _Exchange.apply(rows, sent, incoming, group)
    row_gates = _Exchange.apply(row_gates, sent, incoming, group)
    own = torch.arange(of_source.shape[1], dtype=torch.int32, device=tokens.device).repeat(ranks)
    experts = own.repeat_interleave(of_source.reshape(-1), output_size=sum(incoming))
    results = compute(rows, row_gates[:, None], dispatch(experts[:, None], of_source.shape[1]))
    results = _Exchange.apply(results, incoming, sent, group)

    padded = torch.nn.functional.pad(results, (0, 0, 0, plan.choice_of_row.shape[0] - count))
    return combine(padded, torch.ones_like(gates), plan)


class _Exchange(torch.autograd.Function):
    """The first ``sent[0]`` rows go to rank 0 of the group, the next ``sent[1]`` to rank 1, and so on; returned are the
    ``received[i]`` rows from each rank i, in the ranks' order. A collective; in backward, gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
