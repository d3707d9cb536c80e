"""``router_logits``: the router's linear layer, straight from the tokens' type to float32 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .registry import define


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of(ctx, d_logits):
    x, weight, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    grads = _router_logits_backward(d_logits, x, weight, mask, wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None)


_router_logits = define(
    "router_logits(Tensor x, Tensor weight, Tensor? mask=None) -> Tensor",
    setup_context=_context,
    backward=_backward_of,
    flops=lambda x, weight, *args, out_shape=None, **kwargs: 2 * x[0] * weight[0] * weight[1],
)
_router_logits_backward = define(
    "router_logits_backward(Tensor d_logits, Tensor x, Tensor weight, Tensor? mask, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    flops=lambda d_logits, x, weight, mask, output_mask, out_shape=None, **kwargs: (
        2 * x[0] * weight[0] * weight[1] * sum(output_mask)
    ),
)


def router_logits(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """``logits[t] = weight @ x[t]`` with products and sums in float32, whatever type the tokens have.

    x itself is saved for backward; the compiled kernels and Triton's make no float32 copy of it either.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64.
        weight: [E, D] float32 (float64 beside float64).
        mask: [T] bool, True where the token takes part. The others are not read (a NaN in padding goes nowhere); their
            logits are 0, and so are their gradients.

    Returns:
        [T, E] of weight's type.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        NotImplementedError: on a second derivative.
    """
    checks.tensor("x", x, ("T", "D"), checks.FLOATING, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.tensor("weight", weight, ("E", x.shape[1]), (wide,), x)
    checks.optional("mask", mask, (x.shape[0],), (torch.bool,), x)
    return _router_logits(x, weight, mask)
