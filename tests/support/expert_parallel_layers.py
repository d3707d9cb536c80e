"""A program for ranks: sparse layers whose experts are divided over the ranks, beside layers that have all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from clipup import SparseMoE, aux_loss

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gated": True, "activation": "silu"},
    "without biases": {"bias": False},
    "norm": {"norm": "layer"},
    "capacity": {"capacity_factor": 0.5},
    "gates after dropping": {"capacity_factor": 0.5, "normalize_gates": "after_drop"},
    "priority": {"capacity_factor": 0.5, "priority": True},
    "shared expert": {"shared_expert": True},
    "shards": {"granularity": 2, "top_k": 4},
    "one choice": {"top_k": 1},
    "all experts": {"top_k": 8},
    "selection bias": {"selection_bias": "z_score"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


def tokens_of(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(7 + 3 * rank, 16, generator=generator).to(dtype).requires_grad_()


def layer_of(**options: Any) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(16, 32, num_experts=8, balance_weight=0.01, z_weight=1e-3, **options)


def spread(layer: SparseMoE, mesh: Any, placements: list[Placement]) -> SparseMoE:
    """The layer with the experts' parameters as DTensors."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements)))
    return layer


def outcome(layer: SparseMoE, xs: list[Tensor], call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """Outputs, and all gradients of the sum of a loss over the inputs."""
    ys = [(call or layer)(x) for x in xs]
    (sum((y.float() * (1 + y.float())).sum() for y in ys) + aux_loss(layer)).backward()
    parameters = {f"d {name}": whole(parameter.grad) for name, parameter in layer.named_parameters()}
    return {"y": ys, "dx": [x.grad for x in xs], **parameters}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(
    own: dict[str, Any], expected: dict[str, Any], rank: int, plain: tuple[str, ...] = ("d router", "d shared")
) -> float:
    """The largest error of this rank's outcome, relative to the largest value of each tensor. plain: parameters that
    are no DTensors."""
    largest = 0.0
    for name, value in expected.items():
        found = own[name]
        if isinstance(value, list):
            found, value = found[0], value[rank]
        elif name.partition(".")[0] in plain:  # each rank has the gradient of its own loss
            dist.all_reduce(found)
        scale = value.abs().max().item() if value.numel() else 1.0
        error = (found.double() - value.double()).abs().max().item() if value.numel() else 0.0
        largest = max(largest, error / max(scale, 1e-6))
    return largest


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def run(out: Path) -> None:
    """Writes by case the errors of this rank, and the messages of what was refused."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    errors: dict[str, float | str] = {}

    def compare(name: str, own: dict[str, Any], expected: dict[str, Any]) -> None:
        errors[name] = difference(own, expected, rank)

    for name, options in LAYERS.items():
        dtype = options.get("dtype", torch.float32)
        layer = layer_of(**options)
        expected = outcome(copy.deepcopy(layer), [tokens_of(each, dtype) for each in range(ranks)])
        compare(name, outcome(spread(layer, mesh, [Shard(0)]), [tokens_of(rank, dtype)]), expected)

    layer, plain = spread(layer_of(), mesh, [Shard(0)]), layer_of()
    inputs = [tokens_of(each) for each in range(ranks)]
    expected = outcome(plain, inputs)
    compare(
        "checkpointed", outcome(layer, [tokens_of(rank)], lambda x: checkpoint(layer, x, use_reentrant=False)), expected
    )

    layer = spread(layer_of(), mesh, [Shard(0)])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = outcome(layer_of(), [tokens_of(each) for each in range(ranks)])
    compare("compiled", outcome(layer, [tokens_of(rank)], lambda x: compiled(x)), expected)

    empty = [x.detach()[: 0 if each else None].requires_grad_() for each, x in enumerate(inputs)]
    own, expected = spread(layer_of(), mesh, [Shard(0)]), outcome(layer_of(), empty)
    compare("no tokens on some ranks", outcome(own, [empty[rank].detach().requires_grad_()]), expected)

    def masked(layer: SparseMoE) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x, torch.arange(len(x)) % 3 > 0)

    plain, own = layer_of(), spread(layer_of(), mesh, [Shard(0)])
    expected = outcome(plain, [x.detach().requires_grad_() for x in inputs], masked(plain))
    compare("masked tokens", outcome(own, [tokens_of(rank)], masked(own)), expected)

    for name, context in {"evaluation": nullcontext, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}.items():
        with torch.no_grad(), context():
            y, expected_y = own.eval()(inputs[rank]), plain.eval()(inputs[rank])
        errors[name] = (y.float() - expected_y.float()).abs().max().item()

    expected = outcome(layer_of(), [tokens_of(each) for each in range(ranks)])
    for name, placement in {"replicated": Replicate(), "other axis": Shard(1)}.items():
        compare(name, outcome(spread(layer_of(), mesh, [placement]), [tokens_of(rank)]), expected)
    own = spread(layer_of(), mesh, [Shard(0)])
    own.router.weight = nn.Parameter(distribute_tensor(own.router.weight.detach(), mesh, [Replicate()]))
    errors["replicated router"] = difference(outcome(own, [tokens_of(rank)]), expected, rank, plain=())

    torch.manual_seed(0)
    three = SparseMoE(16, 32, num_experts=3)
    errors["3 experts"] = refused(lambda: spread(three, mesh, [Shard(0)])(tokens_of(0)))
    both = init_device_mesh("cpu", (ranks, 1))
    errors["two dimensions"] = refused(lambda: spread(layer_of(), both, [Shard(0), Shard(0)])(tokens_of(0)))
    x = distribute_tensor(tokens_of(0).detach(), mesh, [Replicate()])
    errors["distributed x"] = refused(lambda: layer_of()(x))
    torch.save(errors, out / f"errors-{rank}.pt")
    dist.destroy_process_group()
