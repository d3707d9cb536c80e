"""What autograd saves for the backward pass, counted while a copy of the model without memory runs forward.

The copy consists of fake tensors (shapes and types alone), so any batch costs nothing. Saved tensors are counted once
per storage. Attention counts as one fused kernel, which saves its operands, its result and a float32 per query;
layer norms run in float32 under autocast, as they do on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..clip.inputs import ignore_padding, image_size, text_length
from ..clip.towers import tower_blocks, towers
from ..moe.layer import moe_layers
from ..precision import Precision, autocast, image_dtype
from ..train.chunked_losses import ChunkedClipLoss, ChunkedSigLipLoss
from ..train.forward import named_output
from ..train.ranks.parallel import ENCODERS
from .units import parameters_of_half_units


class LayerTokens(NamedTuple):
    """A sparse layer's input."""

    name: str
    per_pair: int
    """Tokens of one image or one text of full length."""
    width: int
    bytes_each: int
    """Of an element of the rows that its experts compute with."""


class Activations(NamedTuple):
    """Bytes, linear in the number of pairs of a batch."""

    per_pair: float
    """Saved for each image-text pair."""
    fixed: float
    """Saved once: under autocast, the weights' copies in its type."""
    checkpointed_per_pair: float
    """Saved for each pair with checkpointed blocks: their inputs."""
    largest_block_per_pair: float
    """Of those in ``per_pair``, the most that one block saves: with checkpointing it is computed again in backward."""
    expert_copies: float
    """Of those in ``fixed``, the copies of experts' weights."""
    largest_expert_copies: float
    """Of those, the most that one layer has."""
    layers: tuple[LayerTokens, ...]
    feature_bytes: int
    """Of an element of the features that the loss compares."""
    feature_width: int
    encoder_calls: int
    """Calls of ``ENCODERS`` in a forward pass: open_clip 3 calls one for each tower, open_clip 4 none."""
    trained_towers: tuple[str, ...]
    """Whose features have a gradient."""
    silent_blocks: frozenset[str]
    """Blocks without a backward pass: those of locked towers, up to the first that is trained."""

    def is_silent(self, layer: str) -> bool:
        """Whether a sparse layer is in such a block."""
        return any(layer.startswith(f"{block}.") for block in self.silent_blocks)


def activations(
    model: nn.Module, precision: Precision, device_type: str = "cuda", blocks_in_half: bool = False
) -> Activations:
    """Counts a model's activations. The model, on any device, is neither run nor changed.

    Args:
        device_type: "cuda" or "cpu", whose autocast treats layer norms and norms differently.
        blocks_in_half: the blocks are gathered in bfloat16, so that autocast copies none of their weights.
    """
    few, many = (_run(model, precision, device_type, pairs, False, blocks_in_half) for pairs in (2, 4))
    few_kept, many_kept = (_run(model, precision, device_type, pairs, True, blocks_in_half) for pairs in (2, 4))
    per_pair = (many.saved - few.saved) / 2
    copies = [] if blocks_in_half else [_copies(layer, precision) for layer in moe_layers(model).values()]
    largest = max(many.blocks[name] - few.blocks[name] for name in many.blocks) / 2
    return Activations(
        per_pair=per_pair,
        fixed=few.saved - 2 * per_pair,
        checkpointed_per_pair=(many_kept.saved - few_kept.saved) / 2,
        largest_block_per_pair=largest,
        expert_copies=sum(copies),
        largest_expert_copies=max(copies, default=0),
        layers=few.layers,
        feature_bytes=few.features.element_size(),
        feature_width=few.features.shape[1],
        encoder_calls=few.encoder_calls,
        trained_towers=few.trained_towers,
        silent_blocks=few.silent_blocks,
    )


def saved_bytes(
    model: nn.Module,
    precision: Precision,
    device_type: str,
    pairs: int,
    checkpointed: bool,
    blocks_in_half: bool = False,
) -> int:
    """Bytes saved by the forward pass of a batch, besides parameters, as they are gathered, buffers and inputs."""
    return _run(model, precision, device_type, pairs, checkpointed, blocks_in_half).saved


def bytes_per_logit(siglip: bool, precision: Precision) -> float:
    """Bytes that the contrastive loss saves for each logit, an image compared with a text, of logits that are not
    computed in chunks; the softmax loss has two, one per direction."""
    pairs, width = 64, 8
    loss = ChunkedSigLipLoss() if siglip else ChunkedClipLoss()
    saved = _Saved()
    with _as_in_training(), FakeTensorMode(), autocast(precision, torch.device("cpu")), saved.counting():
        images, texts = (torch.empty(pairs, width, dtype=torch.float32, requires_grad=True) for _ in range(2))
        scales = [torch.empty((), dtype=torch.float32, requires_grad=True) for _ in range(1 + siglip)]
        loss(images, texts, *scales)
    return sum(size for size in saved.sizes() if size >= pairs * pairs) / pairs**2


@contextmanager
def _as_in_training() -> Iterator[None]:
    """Whatever modes the caller is in: with gradients, without autocast of its own, on the CPU."""
    off = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off, torch.device("cpu"):
        yield


class _Run(NamedTuple):
    saved: int
    blocks: dict[str, int]
    layers: tuple[LayerTokens, ...]
    features: Tensor
    encoder_calls: int
    trained_towers: tuple[str, ...]
    silent_blocks: frozenset[str]


def _run(
    model: nn.Module, precision: Precision, device_type: str, pairs: int, checkpointed: bool, blocks_in_half: bool
) -> _Run:
    with ExitStack() as inside:
        inside.enter_context(_as_in_training())
        inside.enter_context(FakeTensorMode())
        fake = _fake_copy(model, parameters_of_half_units(model) if blocks_in_half else set()).train()
        fake.set_grad_checkpointing(checkpointed)
        images = torch.empty(pairs, 3, *image_size(model), dtype=image_dtype(precision) or torch.float32)
        texts = torch.zeros(pairs, text_length(model), dtype=torch.long)
        saved = _Saved(*fake.parameters(), *fake.buffers(), images, texts)
        blocks: dict[str, int] = {}
        layers: list[LayerTokens] = []
        silent: set[str] = set()
        _watch(fake, pairs, saved, blocks, silent, layers, precision)
        calls = _counted_calls(fake, ENCODERS)
        inside.enter_context(_FusedAttention(device_type == "cuda"))
        inside.enter_context(autocast(precision, torch.device("cpu")))
        inside.enter_context(saved.counting())
        output = named_output(fake(images, texts))
    trained = tuple(tower for tower in ("image", "text") if output[f"{tower}_features"].requires_grad)
    features = output["image_features"]
    return _Run(sum(saved.sizes()), blocks, tuple(layers), features, len(calls), trained, frozenset(silent))


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
            module.get_cast_dtype = _returning(original.get_cast_dtype())
    ignore_padding(fake)
    for layer in moe_layers(fake).values():
        layer.config = layer.config.replace(padding_aware=False)  # a fake text has no end to be found
    return fake


def _returning(dtype: torch.dtype) -> Callable[[], torch.dtype]:
    return lambda: dtype


def _watch(
    fake: nn.Module,
    pairs: int,
    saved: _Saved,
    blocks: dict[str, int],
    silent: set[str],
    layers: list[LayerTokens],
    precision: Precision,
) -> None:
    """Notes what each block saves, which have no backward pass, and what each sparse layer gets."""
    for tower in towers(fake):
        for name, block in tower_blocks(fake, tower).items():

            def before(module: nn.Module, args: Any, name: str = name) -> None:
                blocks[name] = -sum(saved.sizes())

            def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                blocks[name] += sum(saved.sizes())
                if not any(one.requires_grad for one in tree_leaves(output) if isinstance(one, Tensor)):
                    silent.add(name)

            block.register_forward_pre_hook(before)
            block.register_forward_hook(after)
    for name, layer in moe_layers(fake).items():

        def note(module: Any, args: tuple[Tensor, ...], output: Any, name: str = name) -> None:
            tokens = args[0].numel() // module.d_model // pairs
            size = 4 if precision == "fp32" else 2
            layers.append(LayerTokens(name, tokens, module.d_model, size))

        layer.register_forward_hook(note)


def _counted_calls(fake: Any, names: tuple[str, ...]) -> list[str]:
    """A list that gets the name of each of these methods that is called."""
    calls: list[str] = []

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        return call

    for name in names:
        setattr(fake, name, counted(name, getattr(fake, name)))
    return calls


def _copies(layer: Any, precision: Precision) -> float:
    """Bytes of the copies of a layer's experts, the shared one too, in autocast's type."""
    if precision not in ("amp", "amp_bf16"):
        return 0
    stacks = [experts for experts in (layer, layer.shared) if experts is not None]
    return sum(2 * parameter.numel() for experts in stacks for parameter in experts.parameters(recurse=False))


class _Saved:
    """The storages of tensors that autograd saves."""

    def __init__(self, *known: Tensor) -> None:
        """known: tensors whose storages do not count."""
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ids = {storage._cdata for storage in self._known}
        self._storages: dict[int, Any] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def sizes(self) -> list[int]:
        """Bytes of each."""
        return [storage.nbytes() for storage in self._storages.values()]

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ids:
            self._storages[storage._cdata] = storage
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by a kernel that saves what fused ones save and, for CUDA, runs norms in float32 as its
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
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _result(query: Tensor, value: Tensor) -> Tensor:
    """[N, heads, length, width], laid out as fused kernels leave it: the heads of a token side by side, so that joining
    them copies nothing."""
    *batch, length, _ = query.shape
    if len(batch) < 2:
        return query.new_empty(*batch, length, value.shape[-1])
    *batch, heads = batch
    return query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = _result(query, value)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError("a plan runs the forward pass alone")
