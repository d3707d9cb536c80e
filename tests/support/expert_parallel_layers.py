"""A program for ranks: sparse layers whose experts are divided over the ranks, beside layers that have all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documents import ROOT, blocks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clipup import SparseMoE, aux_loss

Call = Callable[[SparseMoE, Tensor], Tensor]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, norm": {"gated": True, "activation": "silu", "norm": "layer"},
    "without biases, one choice": {"bias": False, "top_k": 1},
    "capacity": {"capacity_factor": 0.5},
    "gates after dropping": {"capacity_factor": 0.5, "normalize_gates": "after_drop"},
    "priority, shared expert": {"capacity_factor": 0.5, "priority": True, "shared_expert": True},
    "shards": {"granularity": 2, "top_k": 4},
    "all experts, selection bias": {"top_k": 8, "selection_bias": "z_score"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


def tokens_of(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7 + 3 * rank, 16, generator=torch.Generator().manual_seed(rank)).to(dtype)


def layer_of(**options: Any) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(16, 32, num_experts=8, balance_weight=0.01, z_weight=1e-3, **options)


def spread(layer: SparseMoE, mesh: Any, placements: list[Placement]) -> SparseMoE:
    """The layer with the experts' parameters as DTensors."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements)))
    return layer


def outcome(layer: SparseMoE, xs: list[Tensor], call: Call) -> dict[str, Any]:
    """Outputs, and all gradients of the sum of a loss over the inputs."""
    ys = []
    for x in xs:
        torch.manual_seed(1)  # by which a capacity draws whom it drops, on any rank
        ys.append(call(layer, x))
    (sum((y.float() * (1 + y.float())).sum() for y in ys) + aux_loss(layer)).backward()
    parameters = {f"d {name}": whole(parameter.grad) for name, parameter in layer.named_parameters()}
    return {"y": ys, "dx": [x.grad for x in xs], **parameters}


def _compiled(layer: SparseMoE, x: Tensor) -> Tensor:
    """By the layer that is spread; the other one is not compiled."""
    spread_out = hasattr(layer.in_weight, "full_tensor")
    return torch.compile(layer, backend="aot_eager", fullgraph=True)(x) if spread_out else layer(x)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(own: dict[str, Any], expected: dict[str, Any], rank: int) -> float:
    """The largest error of this rank's outcome, relative to the largest value of each tensor."""
    errors = [0.0]
    for name, value in expected.items():
        found, value = (own[name][0], value[rank]) if isinstance(value, list) else (own[name], value)
        if name.startswith(("d router", "d shared")):  # plain parameters: each rank has the gradient of its own loss
            dist.all_reduce(found)
        if value.numel():
            scale = max(value.abs().max().item(), 1e-6)
            errors.append((found.double() - value.double()).abs().max().item() / scale)
    return max(errors)


def loop_of_the_manual(rank: int, ranks: int) -> float:
    """The largest difference of the gradients of the loop of docs/distributed.md from those of replicas."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), layer_of(shared_expert=True))
    expected, x = DistributedDataParallel(copy.deepcopy(model)), tokens_of(rank)
    (expected(x).square().mean() + aux_loss(expected)).backward()
    spreading, step = (block.text for block in blocks(ROOT / "docs" / "distributed.md", "python"))
    page: dict[str, Any] = {"model": model}
    exec(spreading.replace('"cuda", (8,)', f'"cpu", ({ranks},)').replace("lr=", "foreach=True, lr="), page)
    exec(step, page | {"loss": page["replicas"](x).square().mean() + aux_loss(model)})
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return max((whole(own.grad) - other.grad).abs().max().item() for own, other in pairs)


def run(out: Path) -> None:
    """Writes by case the errors of this rank."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    errors: dict[str, float] = {}

    def compare(
        name: str,
        options: dict[str, Any] | None = None,
        call: Call = SparseMoE.__call__,
        placement: Placement | None = None,
        rows: int | None = None,
    ) -> None:
        """rows: of the inputs of all ranks but the first."""

        def inputs() -> list[Tensor]:
            dtype = (options or {}).get("dtype", torch.float32)
            drawn = [tokens_of(each, dtype) for each in range(ranks)]
            return [x[: rows if each else None].requires_grad_() for each, x in enumerate(drawn)]

        expected = outcome(layer_of(**options or {}), inputs(), call)
        own = spread(layer_of(**options or {}), mesh, [placement or Shard(0)])
        errors[name] = difference(outcome(own, [inputs()[rank]], call), expected, rank)

    for name, options in LAYERS.items():
        compare(name, options)
    compare("autocast", call=torch.autocast("cpu", torch.bfloat16)(SparseMoE.__call__))
    compare("checkpointed", call=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    compare("compiled", call=_compiled)
    compare("no tokens on some ranks", rows=0)
    compare("masked tokens", call=lambda layer, x: layer(x, torch.arange(len(x)) % 3 > 0))
    compare("replicated", placement=Replicate())
    compare("other axis", placement=Shard(1))

    errors["the manual's loop"] = loop_of_the_manual(rank, ranks)
    with pytest.raises(ValueError, match="^3 experts cannot be sharded evenly"):
        spread(SparseMoE(16, 32, num_experts=3), mesh, [Shard(0)])(tokens_of(0))
    torch.save(errors, out / f"errors-{rank}.pt")
    dist.destroy_process_group()
