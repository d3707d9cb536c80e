"""The autograd kernel of an op.

torch's own, ``torch.library.register_autograd``, has two gaps. It drops the tangents of forward-mode AD without an
error, so that a derivative comes out as zero. And it refuses ``torch.func`` (grad, vjp, jacrev, per-sample gradients).
This kernel refuses tangents with an error, and differentiates at any level of ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._library.utils import fill_defaults
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def kernel_of(op: torch._ops.OpOverload, setup_context: Callable | None, backward: Callable) -> Callable[..., Any]:
    """The kernel of ``op`` at the dispatch key Autograd, registered with its key set as the first argument.

    ``setup_context`` is that of ``torch.library.register_autograd``. ``backward(ctx, needs, *grads)`` returns gradients
    by the names of the op's arguments; ``needs`` tells by name which arguments need one, and others are dropped.
    """
    names = [argument.name for argument in op._schema.arguments]

    def run(keyset: Any, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def run_in_transform(keyset: Any, args: tuple) -> Any:
        """A node runs its forward without gradients, but the levels of ``torch.func`` below this one need theirs."""
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run(keyset, args)

    def forward(ctx: Any, run: Callable, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        output = run(keyset, tuple(args))
        if setup_context is not None:
            setup_context(ctx, fill_defaults(op._schema, tuple(args), {})[0], output)
        return output

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = dict(zip(names, ctx.needs_input_grad, strict=False))
        by_name = backward(ctx, needs, *grads)
        return *(by_name.get(name) if needed else None for name, needed in needs.items()), None

    def node_of(run: Callable) -> Any:
        """The key set is the last argument, so that ``needs_input_grad`` begins as the schema does."""
        methods = {
            "forward": staticmethod(lambda ctx, *args: forward(ctx, run, *args)),
            "backward": staticmethod(gradients),
            "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
        }
        return type(f"clipup_{op._opname}", (_SingleLevelFunction,), methods)

    node, node_in_transform = node_of(run), node_of(run_in_transform)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(keyset, args)
        if not torch._C._are_functorch_transforms_active():
            return node.apply(*args, keyset)
        with enable_single_level_autograd_function():  # the dispatcher has already entered the transform's level
            return node_in_transform.apply(*args, keyset)

    return kernel


def _refuse_tangents(op: torch._ops.OpOverload, args: tuple) -> None:
    """Raises ``NotImplementedError`` if an argument is a dual tensor of forward-mode AD."""
    for argument in args:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{op._schema.name} has no forward-mode derivative (torch.func.jvp, jacfwd and linearize, "
                "torch.autograd.forward_ad); use reverse mode (backward, torch.func.vjp, jacrev), or the function of "
                "clipup_kernels.reference, which is plain torch"
            )
