"""How a model is spread over the ranks: replicas (DDP), shards (FSDP2), and experts on different ranks.

| parameters       | default    | --fsdp  | --ep N                       | --fsdp --ep N              |
|------------------|------------|---------|------------------------------|----------------------------|
| experts          | replicated | sharded | E/N on each rank, replicated | E/N on each rank, sharded  |
| small ones       | replicated | replicated | replicated                | replicated                 |
| all others       | replicated | sharded | replicated                   | sharded                    |

Small ones are the scalars, and the norms and layer scales of blocks (``replicated_parameters``).

With ``--fsdp-replicas R`` the ranks form R groups; parameters are sharded within a group and replicated over groups.
Each rank has samples of its own in all cases. Gradients are the means over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...clip.towers import tower_blocks, towers
from ...moe.expert_parallel import is_distributed, shard_of
from ...moe.layer import SparseMoE, moe_layers
from ...moe.router import Router
from ...precision import Precision
from .options import ParallelOptions
from .ranks import Ranks

ENCODERS = ("encode_image", "encode_text")
"""Methods of a model that gather and release parameters outside blocks, as the model's forward pass does."""
_EP = "ep"
"""The dimension of a mesh over which experts are divided."""


def check(model: nn.Module, options: ParallelOptions, ranks: Ranks) -> None:
    """
    Raises:
        ValueError: the model or the ranks do not allow what the options ask for.
    """
    if not options.is_sharded:
        return
    if not ranks.several:
        raise ValueError(
            f"{'fsdp' if options.fsdp else f'ep={options.ep}'} shards a model over several processes, and this is one; "
            "start it with torchrun --nproc-per-node N -m clipup -- train ..., or leave the option out"
        )
    parts = options.fsdp_replicas * options.ep
    if ranks.world_size % parts:
        raise ValueError(
            f"fsdp_replicas {options.fsdp_replicas} * ep {options.ep} must divide the number of ranks, "
            f"{ranks.world_size}"
        )
    if options.ep > 1:
        layers = moe_layers(model)
        if not layers:
            raise ValueError(f"ep={options.ep} places experts on different ranks, and the model has none; set moe")
        for name, layer in layers.items():
            if layer.config.num_experts % options.ep:
                raise ValueError(
                    f"ep={options.ep} does not divide the {layer.config.num_experts} experts of {name}; use a divisor"
                )


def wrapped(model: nn.Module, options: ParallelOptions, ranks: Ranks, precision: Precision) -> nn.Module:
    """The model that a step runs. Sharded models are changed in place: their parameters become DTensors, equal to those
    of rank 0 before."""
    if not ranks.several:
        return model
    if not options.is_sharded:
        return DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    _Sharding(options, ranks, precision).apply(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether no rank has all weights, so that all ranks must run the same forward passes."""
    return any(is_distributed(parameter) for parameter in model.parameters())


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of batch norms, which a forward pass in training changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def share_batch_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Gives all ranks the batch norm statistics of rank 0, which checkpoints contain; ranks differ because each sees
    its own images."""
    if ranks.several:
        for buffer in batch_statistics(model):
            dist.broadcast(buffer, src=0)


def synchronize_gradients(model: Any, wanted: bool) -> None:
    """Whether the forward and backward passes from here on average the gradients over ranks."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted  # as ``no_sync`` does
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(wanted)


class _Sharding:
    """Shards a model by FSDP2, block by block.

    Two meshes span the same ranks: one for experts, (replicas, shards, ep), and one for everything else, (replicas,
    shards * ep). Without ``fsdp`` there is one shard, so that FSDP2 keeps a replica on each rank and only averages
    gradients.

    With amp_bf16, the matrices of blocks and experts are gathered with their biases in bfloat16, in which autocast
    computes with them anyway. Routers and what is outside of blocks are gathered in float32. Gradients are reduced in
    float32.
    """

    def __init__(self, options: ParallelOptions, ranks: Ranks, precision: Precision) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        self.ep = options.ep
        replicas = options.fsdp_replicas if options.fsdp else ranks.world_size // options.ep
        shards = ranks.world_size // (replicas * options.ep)
        kind = ranks.device.type
        dense = (replicas, shards * options.ep) if options.fsdp else (ranks.world_size, 1)
        self.dense = init_device_mesh(kind, dense, mesh_dim_names=("replicas", "shards"))
        names = ("replicas", "shards", _EP)
        self.experts = init_device_mesh(kind, (replicas, shards, options.ep), mesh_dim_names=names)
        for group in (*self.dense.get_all_groups(), *self.experts.get_all_groups()):  # theirs would be torch's default
            dist.distributed_c10d._set_pg_timeout(ranks.timeout, group)
        offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if options.fsdp_offload_cpu else OffloadPolicy()
        self.policies: dict[str, Any] = {
            "reshard_after_forward": not options.fsdp_no_reshard_after_forward,
            "offload_policy": offload,
        }
        half = torch.bfloat16 if precision == "amp_bf16" else None
        self.in_half = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
        self.in_full = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)

    def apply(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.policies["ignored_params"] = set(replicated_parameters(model).values())
        if self.ep > 1 or self.in_half != self.in_full:
            for router in [module for module in model.modules() if isinstance(module, Router)]:
                self._shard(router, mp_policy=self.in_full)
        if self.ep > 1:
            for layer in moe_layers(model).values():
                self._place_experts(layer)
        for tower in towers(model):
            for block in blocks_of(model, tower):
                self._shard(block, mp_policy=self.in_half, shard_placement_fn=self._axis)
        self._shard(model, mp_policy=self.in_full)
        for name in ENCODERS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def _axis(self, parameter: nn.Parameter) -> Any:
        """The axis of a block's parameter to shard. FSDP2 pads the first axis if it is shorter than the number of
        shards, as that of stacked experts may be."""
        from torch.distributed.tensor import Shard

        shards = self.dense["shards"].size()
        return (
            Shard(1)
            if parameter.ndim > 1 and parameter.shape[0] < shards and parameter.shape[1] % shards == 0
            else None
        )

    def _place_experts(self, layer: SparseMoE) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = self.experts[_EP]
        for name, parameter in list(layer.named_parameters(recurse=False)):
            own = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(layer, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
        if layer.shared is not None:
            self._shard(layer.shared, mp_policy=self.in_half)
        over = self.experts["replicas", "shards"]
        self._shard(layer, over, mp_policy=self.in_half, shard_placement_fn=lambda parameter: Shard(1))

    def _shard(self, module: nn.Module, mesh: Any = None, **more: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=mesh or self.dense, **self.policies, **more)


def replicated_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that every rank holds whole although the model is sharded: scalars, and in blocks the
    parameters of modules that have no matrix (norms and layer scales), with which autocast computes in float32."""
    replicated = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 0}
    names = {module: name for name, module in model.named_modules()}
    for block in [block for tower in towers(model) for block in blocks_of(model, tower)]:
        for module in block.modules():
            own = list(module.named_parameters(recurse=False))
            if all(parameter.ndim < 2 for _, parameter in own):
                replicated |= {f"{names[module]}.{name}": parameter for name, parameter in own}
    return replicated


def blocks_of(model: nn.Module, tower: str) -> list[nn.Module]:
    """The blocks of a tower; none if it is not a stack of blocks."""
    try:
        return list(tower_blocks(model, tower).values())
    except TypeError:
        return []


@torch.no_grad()
def finish_gradients(model: nn.Module, world_size: int) -> None:
    """Makes all gradients of a sharded model means over the ranks, including those that FSDP2 does not average."""
    if not is_sharded(model):
        return
    gradients: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    whole = [gradient for gradient in gradients if not is_distributed(gradient)]
    if whole:  # not on the device of the others where those are offloaded
        joined = torch.cat([gradient.reshape(-1) for gradient in whole])
        dist.all_reduce(joined)
        means = (joined / world_size).split([gradient.numel() for gradient in whole])
        for gradient, mean in zip(whole, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
    for gradient in filter(is_distributed, gradients):
        if _EP in (gradient.device_mesh.mesh_dim_names or ()):  # a sum over the ranks that the rows came from
            shard_of(gradient).div_(gradient.device_mesh[_EP].size())


@torch.no_grad()
def gradient_norm(model: nn.Module, device: torch.device) -> Tensor:
    """[] float32 on the device: the Euclidean norm of all gradients; the same on every rank."""
    total = torch.zeros((), device=device)
    for parameters in _by_mesh(model):
        norm: Any = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.to(device)  # offloaded shards lie on the CPU
        total += (norm.full_tensor() if is_distributed(norm) else norm).square()
    return total.sqrt()


def clip_gradients(model: nn.Module, largest: float, norm: Tensor) -> None:
    """Scales the gradients, whose norm this is, to ``largest`` if it is more."""
    for parameters in _by_mesh(model):
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def _by_mesh(model: nn.Module) -> Iterable[list[Any]]:
    """Parameters grouped by device mesh; plain parameters form a group too."""
    groups: dict[Any, list[Any]] = {}
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if is_distributed(parameter) else None, []).append(parameter)
    return groups.values()
