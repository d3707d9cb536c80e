"""What ranks hold and send in a real step of a tiny CLIP, for plans to be compared with."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_parallel
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from clipup.precision import autocast
from clipup.train import TrainOptions
from clipup.train.objectives.selection import create_objective
from clipup.train.optimizer.groups import create_optimizer
from clipup.train.optimizer.locks import lock_parts
from clipup.train.parallel import sharding as parallel
from clipup.train.parallel.ranks import joined
from clipup.train.step import TrainStep

_COLLECTIVES = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.allgather_": ("all_gather", 0),
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.scatter_": ("reduce_scatter", 1),  # of which gloo makes one
    "c10d.alltoall_base_": ("all_to_all", 1),
    "c10d.send": ("send", 0),
    "c10d.broadcast_": ("broadcast", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
}
"""What an op is, and where its payload is: the place among its arguments of the larger one of input and result, None if
it returns that. With the functional ones open_clip 4 gathers features."""


class Collectives(TorchDispatchMode):
    """Counts the bytes that collectives of several ranks are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind, place = _COLLECTIVES.get(str(func._overloadpacket), (None, 0))
        groups = [dist.ProcessGroup.unbox(one) for one in args if _is_group(one)]
        if kind is not None and all(group.size() > 1 for group in groups):
            payload = result if place is None else args[place]
            self.payload[kind] += sum(tensor.nbytes for tensor in tree_leaves(payload))
        return result


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Under autocast norms run in float32, as CUDA's autocast, for which plans are, runs them."""
    with mock.patch.object(F, "layer_norm", _wide(F.layer_norm)), mock.patch.object(F, "normalize", _wide(F.normalize)):
        yield


def _wide(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wide(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return norm(*args, **kwargs)

    return wide


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def batches(count: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A rank's part of a global batch, in ``count`` pieces. The texts fill their context."""
    size = tiny_parallel.GLOBAL_BATCH // ranks // count
    texts = torch.randint(1, 62, (count, size, 8))
    texts[..., -1] = 63
    return [(torch.randn(size, 3, 16, 16), texts[i]) for i in range(count)]


def measure(out: Path, cases: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]) -> None:
    """A program for ranks: writes what this one holds and sends in a step of each case."""
    found = {}
    for name, (moe, given) in cases.items():
        options = TrainOptions.flat(device="cpu", **given)
        with joined(options.processes, options.speed.device) as ranks, norms_in_float32():
            model = tiny_parallel.model(moe, options.loss.siglip)
            lock_parts(model, options.trained_parts)
            precision = options.precision_on("cpu")
            objective = create_objective(options.loss, model, ranks, precision)
            model.set_grad_checkpointing(options.speed.grad_checkpointing)
            wrapped = parallel.wrapped(model, options.parallel, ranks, precision)
            optimizer = create_optimizer(model, options.optimizer)
            step = TrainStep(wrapped, objective, optimizer, ranks.device, precision, world_size=ranks.world_size)
            batch = batches(options.step.accum_freq, ranks.world_size)
            for _ in range(1 if options.parallel.is_sharded else 2):  # DDP rebuilds its buckets in the second
                step(batch)
            with Collectives() as sent:
                step(batch)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), autocast(precision, ranks.device):
                saved = saved_in_forward(model, batch[0])
            found[name] = {"sent": sent.payload, **_held(model, optimizer), "saved": saved}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


def _held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    parameters = [parallel.shard_of(parameter) for parameter in model.parameters()]
    gradients = [parallel.shard_of(one.grad) for one in model.parameters() if one.requires_grad]
    moments = [parallel.shard_of(value) for state in optimizer.state.values() for value in state.values()]
    named = {"parameters": parameters, "gradients": gradients, "optimizer": moments}
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in named.items()}


def saved_in_forward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes that autograd saves in a forward pass, besides parameters and inputs."""
    saved, known = {}, {}

    def note(found: dict[int, Any], *tensors: torch.Tensor) -> torch.Tensor:
        found |= {storage._cdata: storage for storage in map(torch.Tensor.untyped_storage, tensors)}
        return tensors[0] if tensors else None

    def parameters_of(module: torch.nn.Module, *_: Any) -> None:
        note(known, *map(parallel.shard_of, module.parameters()))

    note(known, *batch, *model.buffers())
    hooks = [module.register_forward_pre_hook(parameters_of) for module in model.modules()]
    with saved_tensors_hooks(lambda tensor: note(saved, tensor), lambda tensor: tensor):
        output = model(*batch)
    sum(output[name].sum() for name in ("image_features", "text_features")).backward()
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for key, storage in saved.items() if key not in known)
