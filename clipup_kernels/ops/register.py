"""Registers ops with ``torch.library``: schema, kernels, meta function, autograd and FLOP formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends import meta, registry, torch_eager
from . import autograd, packed_weights

LIBRARY = torch.library.Library("clipup", "DEF")


def define(
    schema: str,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    flops: Callable | None = None,
    packed: bool = False,
) -> Callable:
    """Registers ``clipup::<schema>`` and returns the op.

    Its kernels are the backends' functions of the op's name: ``registry`` chooses one on CPU and CUDA, ``torch_eager``
    runs on any other device, ``meta`` gives the outputs' shapes. An op on ``packed`` weights has kernels on the CPU
    only. ``backward`` is that of ``autograd.kernel_of``. An op without it refuses differentiation by name; that is how
    second derivatives are refused. Every op refuses forward-mode AD by name. ``flops`` takes the arguments by name,
    with the shapes of tensors, and returns the FLOPs.
    """
    name = schema.partition("(")[0]
    qualified = f"clipup::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    if packed:
        LIBRARY.impl(name, registry.packed_kernel_of(name, packed_weights.check_layout), "CPU")
    else:
        LIBRARY.impl(name, registry.kernel_of(name, "cpu"), "CPU")
        LIBRARY.impl(name, registry.kernel_of(name, "cuda"), "CUDA")
        LIBRARY.impl(name, getattr(torch_eager, name), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, getattr(meta, name), lib=LIBRARY)
    if backward is None:

        def backward(ctx, needs, *grads):
            raise NotImplementedError(f"{qualified} has no derivative")

    op = getattr(torch.ops.clipup, name)
    LIBRARY.impl(name, autograd.kernel_of(op.default, setup_context, backward), "Autograd", with_keyset=True)
    if flops is not None:
        names = [argument.name for argument in op.default._schema.arguments]
        register_flop_formula(op)(
            lambda *args, out_shape=None, **kwargs: flops({**dict(zip(names, args, strict=False)), **kwargs})
        )
    return op


def save_inputs(ctx, inputs, output) -> None:
    """``setup_context`` of ops whose backward pass reads all of their arguments."""
    ctx.save_for_backward(*inputs)


def non_differentiable(ctx, inputs, output) -> None:
    """``setup_context`` of ops whose outputs are indices."""
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*outputs)
