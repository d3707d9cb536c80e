"""What autograd saves for the backward pass, counted while a copy of the model without memory runs forward.

The copy consists of fake tensors (shapes and types alone), so any batch costs nothing. Saved tensors are counted once
per storage. Attention counts as one fused kernel, which saves its operands, its result and a float32 per query;
layer norms run in float32 under autocast, as they do on CUDA.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..clip.inputs import ignore_padding, image_size, text_length
from ..clip.towers import tower_blocks, towers
from ..moe.layer import moe_layers
from ..precision import Precision, autocast, image_dtype
from ..train.forward import named_output
from .units import parameters_of_half_units


class LayerTokens(NamedTuple):
    """A sparse layer's input."""

    name: str
    per_pair: int
    """Tokens of one image or one text of full length."""
    width: int
    bytes_each: int
    """Bytes of an element of its experts' rows."""


class Activations(NamedTuple):
    """Bytes, linear in the number of pairs of a batch."""

    per_pair: float
    """Saved for each image-text pair."""
    fixed: float
    """Saved once: under autocast, the weights' copies in its type."""
    checkpointed_per_pair: float
    """Saved for each pair with checkpointed blocks: their inputs."""
    largest_block_per_pair: float
    """The most that one block saves, part of ``per_pair``; with checkpointing, backward computes it again."""
    expert_copies: tuple[float, ...]
    """Copies of each sparse layer's expert weights, part of ``fixed``."""
    layers: tuple[LayerTokens, ...]
    features: dict[str, Tensor]
    """The features that the loss compares, by tower, without memory: they show type, width, and whether there is a
    gradient."""


def activations(
    model: nn.Module, precision: Precision, device_type: str = "cuda", blocks_in_half: bool = False
) -> Activations:
    """Counts a model's activations. The model, on any device, is neither run nor changed.

    Args:
        device_type: "cuda" or "cpu", whose autocast treats layer norms and norms differently.
        blocks_in_half: the blocks are gathered in bfloat16, so that autocast copies none of their weights.
    """
    few, many = (ForwardPass(model, precision, device_type, pairs, False, blocks_in_half) for pairs in (2, 4))
    few_kept, many_kept = (ForwardPass(model, precision, device_type, pairs, True, blocks_in_half) for pairs in (2, 4))
    per_pair = (many.saved - few.saved) / 2
    layers = [] if blocks_in_half or precision not in ("amp", "amp_bf16") else moe_layers(model).values()
    return Activations(
        per_pair=per_pair,
        fixed=few.saved - 2 * per_pair,
        checkpointed_per_pair=(many_kept.saved - few_kept.saved) / 2,
        largest_block_per_pair=max(many.blocks[name] - few.blocks[name] for name in many.blocks) / 2,
        expert_copies=tuple(map(_half_bytes, layers)),
        layers=tuple(few.layers),
        features=few.features,
    )


class ForwardPass:
    """A forward pass of a batch through a copy of the model without memory."""

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        device_type: str,
        pairs: int,
        checkpointed: bool,
        blocks_in_half: bool = False,
    ) -> None:
        self.blocks: dict[str, int] = {}
        """Bytes that each block saves."""
        self.layers: list[LayerTokens] = []
        self._storages: dict[int, Any] = {}
        with FakeTensorMode():
            fake = _fake_copy(model, parameters_of_half_units(model) if blocks_in_half else set()).train()
            fake.set_grad_checkpointing(checkpointed)
            images = torch.empty(pairs, 3, *image_size(model), dtype=image_dtype(precision) or torch.float32)
            texts = torch.zeros(pairs, text_length(model), dtype=torch.long)
            self._watch(fake, pairs, 4 if precision == "fp32" else 2)
            held = [tensor.untyped_storage() for tensor in (*fake.parameters(), *fake.buffers(), images, texts)]
            ids = {storage._cdata for storage in held}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in ids:
                    self._storages[storage._cdata] = storage
                return tensor

            fused = _FusedAttention(device_type == "cuda")
            with fused, autocast(precision, torch.device("cpu")), saved_tensors_hooks(keep, lambda tensor: tensor):
                output = named_output(fake(images, texts))
        self.features: dict[str, Tensor] = {tower: output[f"{tower}_features"] for tower in ("image", "text")}

    @property
    def saved(self) -> int:
        """Bytes that autograd has saved, besides parameters, as they are gathered, buffers and inputs."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def _watch(self, fake: nn.Module, pairs: int, bytes_each: int) -> None:
        def note(module: Any, args: tuple[Tensor, ...], output: Any, name: str) -> None:
            tokens = args[0].numel() // module.d_model // pairs
            self.layers.append(LayerTokens(name, tokens, module.d_model, bytes_each))

        def add(*_: Any, name: str, sign: int) -> None:
            self.blocks[name] = self.blocks.get(name, 0) + sign * self.saved

        for name, block in (pair for tower in towers(fake) for pair in tower_blocks(fake, tower).items()):
            block.register_forward_pre_hook(partial(add, name=name, sign=-1))
            block.register_forward_hook(partial(add, name=name, sign=1))
        for name, layer in moe_layers(fake).items():
            layer.register_forward_hook(partial(note, name=name))


def _fake_copy(model: nn.Module, in_half: set[int]) -> Any:
    """Called inside a fake mode. in_half: the ids of parameters that are in bfloat16."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        dtype = torch.bfloat16 if id(parameter) in in_half else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    fake = copy.deepcopy(model, memo)
    pairs: Any = zip(fake.modules(), model.modules(), strict=True)
    for module, original in pairs:
        if hasattr(original, "get_cast_dtype"):  # of embedded texts; it is read before blocks are gathered
            module.get_cast_dtype = partial(lambda dtype: dtype, original.get_cast_dtype())
    ignore_padding(fake)
    for layer in moe_layers(fake).values():
        layer.config = layer.config.replace(padding_aware=False)  # a fake text has no end to be found
    return fake


def _half_bytes(layer: Any) -> float:
    """Bytes of a copy of a layer's experts, the shared one too, in autocast's type."""
    stacks = [experts for experts in (layer, layer.shared) if experts is not None]
    return sum(2 * parameter.numel() for experts in stacks for parameter in experts.parameters(recurse=False))


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by a kernel that saves what fused kernels save and, for CUDA, runs norms in float32 as its
    autocast does."""

    def __init__(self, norms_in_float32: bool) -> None:
        super().__init__()
        self.norms_in_float32 = norms_in_float32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cast = torch.is_autocast_enabled("cpu")
        if func is F.scaled_dot_product_attention:
            operands = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
            if cast:
                operands = [operand.to(torch.get_autocast_dtype("cpu")) for operand in operands]
            return _Attention.apply(*operands)
        if cast and self.norms_in_float32 and func in (F.layer_norm, F.normalize):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[..., heads, length, width], laid out as fused kernels leave it: the heads of a token side by side, so that
        joining them copies nothing. Three axes (batch and heads in one) have no such layout."""
        *batch, heads, length, _ = query.shape
        result = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)
        if not batch:
            result = result.contiguous()
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result
