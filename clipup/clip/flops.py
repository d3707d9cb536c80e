"""FLOPs and parameter counts of CLIP models, dense and sparse.

FLOPs are counted by torch's ``FlopCounterMode`` while a copy of the model on the meta device encodes one image and one
text. A multiply-add is 2 FLOPs; only matrix products, convolutions and attention are counted.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import checks
from ..moe.layer import moe_layers
from .inputs import encoders, ignore_padding, image_channels, image_dtype, image_size, text_length


class TowerCounts(NamedTuple):
    """FLOPs for one image and one text, and parameters."""

    image_gflops: float
    """10^9 FLOPs to encode one image."""
    text_gflops: float
    """10^9 FLOPs to encode one text of full context length; 0 for a model without a text tower."""
    params: int
    """Number of all parameters."""
    active_params: int
    """Parameters that are active per token: all except those of the experts it is not routed to."""


def count(model: nn.Module) -> TowerCounts:
    """Counts the FLOPs and parameters of an open_clip or timm model, dense or sparse, on any device.

    The model is neither run nor changed. FLOPs are those without token dropping, with expert choice those of ceil(f K)
    choices per token. The decoder of a CoCa, which is not used to compute features, counts in the parameters only.

    Raises:
        ValueError: the model was prepared by ``clipup.accelerate``.
    """
    checks.plain_weights("model", model)
    meta = meta_copy(model).eval()
    for layer in moe_layers(meta).values():  # plans of expert choice have places for all experts of a token
        layer.config = layer.config.replace(routing="token_choice", top_k=layer.config.mean_choices)
    ignore_padding(meta)
    encode = encoders(meta)
    images = torch.empty(1, image_channels(model), *image_size(model), dtype=image_dtype(model), device="meta")
    inputs = {"image": images}
    if "text" in encode:
        inputs["text"] = torch.zeros(1, text_length(model), dtype=torch.long, device="meta")
    gflops = {name: _flops(encode[name], values) / 1e9 for name, values in inputs.items()}
    return TowerCounts(
        image_gflops=gflops["image"],
        text_gflops=gflops.get("text", 0.0),
        params=sum(parameter.numel() for parameter in model.parameters()),
        active_params=count_active(model),
    )


def count_active(model: nn.Module) -> int:
    """Parameters that are active per token: in each sparse layer the router and K of E experts, and all others."""
    active = sum(parameter.numel() for parameter in model.parameters())
    for layer in moe_layers(model).values():
        experts = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        active -= experts - experts // layer.config.num_experts * layer.config.mean_choices
    return active


_WITH_HOOKS = re.compile(r"(clipup|torch|open_clip|timm|transformers|peft)\b")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, without memory for its weights and without gradients; with the hooks of
    the libraries that models are made of, but not the user's, which may read values or keep outputs."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            kept = {
                number: hook
                for number, hook in hooks.items()
                if _WITH_HOOKS.match(getattr(hook, "__module__", None) or "")
            }
            memo[id(hooks)] = OrderedDict(copy.deepcopy(kept, memo))
    return copy.deepcopy(model, memo)


def _flops(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    with torch.no_grad(), countable_attention(), FlopCounterMode(display=False) as counter:
        encode(inputs)
    return counter.get_total_flops()


@contextmanager
def countable_attention() -> Iterator[None]:
    """Runs attention as matrix products that FlopCounterMode sees: math backend, no fast path of MultiheadAttention."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
