"""State that a sparse layer keeps between forward passes: untaken losses, load, and the routing of the last tokens.

The state of a forward pass belongs to the thread that ran it: only that thread takes its loss and reads its routing.
The load belongs to the layer.

A loss must outlive its forward pass, because the training loop adds it to its own loss later, but not its graph. A
record of a loss is released
- when ``aux_loss`` takes it, or
- when backward runs through the layer's output (the graph is freed), or
- when the output of its forward pass is gone (nothing can train on it any more), unless it is its thread's newest.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from clipup_kernels import Gating, Plan

from .router import Routing
from .step_counts import StepCounts

_APPLY = vars(Function)["apply"].__func__.__code__
"""What runs the forward pass of a custom ``autograd.Function``, without gradients."""


class LossRecord:
    """The weighted loss of one forward pass, with its graph; None after it was taken or its graph freed."""

    __slots__ = ("loss", "__weakref__")

    def __init__(self, loss: Tensor) -> None:
        self.loss: Tensor | None = loss

    def take(self) -> Tensor | None:
        loss, self.loss = self.loss, None
        return loss

    def drop(self, gradient: Tensor) -> None:
        """The hook on the layer's output, whose gradient it does not change."""
        if self.take() is not None:
            warnings.warn(
                "backward runs through a sparse layer whose routing losses nobody took: add clipup.aux_loss(model) to "
                "the loss before backward, or set their weights in MoEConfig to 0 (model.eval() has no losses)",
                stacklevel=1,  # the frames above are torch's, or none
            )


class LastRouting(NamedTuple):
    """The routing of the last forward pass, detached, for ``moe_metrics``."""

    logits: Tensor
    """[T, E] float32: the logits that selection used."""
    mask: Tensor | None
    """[T] bool."""
    expert_indices: Tensor
    """[T, K] int32."""
    tokens_per_expert: Tensor
    """[K, E] int32."""
    offsets: Tensor
    """[E+1] int32: Plan.offsets; the last is the number of (token, choice) pairs that got a slot."""
    mean_probs: Tensor
    """[E] float32."""
    z_loss: Tensor
    """[] float32."""

    @classmethod
    def of(cls, logits: Tensor, gating: Gating, plan: Plan, mask: Tensor | None) -> LastRouting:
        return cls(
            logits=logits.detach(),
            mask=mask,
            expert_indices=gating.expert_indices,
            tokens_per_expert=gating.tokens_per_expert,
            offsets=plan.offsets,
            mean_probs=gating.mean_probs.detach(),
            z_loss=gating.z_loss.detach(),
        )


class _Kept:
    """What the forward passes of one thread store for ``aux_loss`` and ``update_selection_bias``.

    Only that thread writes ``waiting`` and ``load``, and only ``LayerState.take_load`` writes ``counted``: no thread
    waits for another, and no update is lost.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.waiting: list[weakref.ref[LossRecord]] = []
        self.load: Tensor | None = None
        """[E] int64: tokens per expert in all forward passes so far."""
        self.counted: Tensor | None = None
        """The value of ``load`` at the last ``take_load``."""

    def untaken(self) -> int:
        return sum(_untaken(ref) for ref in self.waiting)

    def is_over(self) -> bool:
        """Whether the thread has ended and nothing of it is left to take."""
        return not self.thread.is_alive() and self.load is self.counted and not self.untaken()


class _State:
    """The calling thread's state, released with the thread; what other threads may read is in ``kept``."""

    def __init__(self) -> None:
        self.ran_layer = False
        self.evaluated = False
        """Whether the last forward pass recorded gradients in evaluation mode, in which it has no losses."""
        self.warned = False
        self.last_routing: LastRouting | Callable[[], LastRouting] | None = None
        self.newest: LossRecord | None = None
        self.kept = _Kept()


class _OfThread(threading.local):
    """``state`` per thread: a separate object, because ``torch.compile`` loses assignments to attributes of a subclass
    of ``threading.local``."""

    def __init__(self, everyone: list[_Kept], lock: threading.Lock) -> None:
        self.state = _State()
        with lock:
            everyone[:] = [kept for kept in everyone if not kept.is_over()] + [self.state.kept]


class LayerState:
    """The state of one layer. Copies made by deepcopy or pickle are empty: graphs belong to the original."""

    def __init__(self) -> None:
        self._all_kept: list[_Kept] = []
        self._lock = threading.Lock()
        self._threads = _OfThread(self._all_kept, self._lock)
        self.step_counts: StepCounts | None = None
        """The counts of all batches of an accumulated step, which its losses use, also where autograd's thread runs the
        forward again."""

    @property
    def mine(self) -> _State:
        """The calling thread's part."""
        return self._threads.state

    @property
    def last_routing(self) -> LastRouting | None:
        """The routing of the calling thread's last forward pass."""
        routing = self.mine.last_routing
        return routing() if callable(routing) else routing

    def keep_inference(self, routing: Callable[[], LastRouting]) -> None:
        """``keep`` for a forward pass without losses; ``routing`` is called when it is needed."""
        self.mine.ran_layer = True
        if not _in_transform():
            self.mine.last_routing = routing

    def keep(self, routing: Routing, output: Tensor, loss: Tensor | None, counts_load: bool, evaluates: bool) -> None:
        """Stores the state of the forward pass that returns ``output``; ``loss`` is None if there is none to train on.

        Under ``torch.compile`` this also works inside a checkpointed region, whose recomputation stores nothing.
        """
        if torch.compiler.is_dynamo_compiling():
            from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer as unchecked

            unchecked(self._keep, routing, output, loss, counts_load, evaluates)
        else:
            self._keep(routing, output, loss, counts_load, evaluates)

    def _keep(self, routing: Routing, output: Tensor, loss: Tensor | None, counts_load: bool, evaluates: bool) -> None:
        mine = self.mine
        mine.ran_layer, mine.evaluated = True, evaluates and output.requires_grad
        if not _in_transform():
            mine.last_routing = LastRouting.of(routing.noisy_logits, routing.gating, routing.plan, routing.mask)
            if counts_load:
                load = routing.gating.tokens_per_expert.sum(0)
                mine.kept.load = load if mine.kept.load is None else mine.kept.load + load
        if loss is not None and loss.requires_grad:
            self._keep_loss(loss, output)

    def _keep_loss(self, loss: Tensor, output: Tensor) -> None:
        """Under ``torch.compile`` the newest loss replaces all earlier ones."""
        record, mine = LossRecord(loss), self.mine
        if not torch.compiler.is_compiling():
            if output.requires_grad:
                output.register_hook(record.drop)
            mine.kept.waiting = [*filter(_untaken, mine.kept.waiting), weakref.ref(record)]
        mine.newest = record

    def take_evaluated(self) -> bool:
        """Whether the calling thread's last forward pass since the losses were taken recorded gradients in evaluation
        mode; True only once."""
        mine = self.mine
        news = mine.evaluated and not mine.warned
        mine.warned |= news
        return news

    def take_losses(self) -> list[Tensor]:
        """Returns and releases the untaken losses of the calling thread's forward passes."""
        mine = self.mine
        records = [*(ref() for ref in mine.kept.waiting), mine.newest]
        mine.newest, mine.kept.waiting, mine.evaluated = None, [], False
        losses = [record.take() for record in records if record is not None]
        return [loss for loss in losses if loss is not None and not _has_left_its_transform(loss)]

    def untaken_elsewhere(self) -> int:
        """Number of losses of other threads that the caller may have meant to take: those of threads that have ended,
        and those of all threads if the caller has not run the layer itself."""
        mine = self.mine
        with self._lock:
            others = [kept for kept in self._all_kept if kept is not mine.kept]
        return sum(kept.untaken() for kept in others if not (mine.ran_layer and kept.thread.is_alive()))

    def take_load(self) -> Tensor | None:
        """[E] int64: tokens per expert in all threads' forward passes since the last call; None if there were none."""
        news = []
        with self._lock:
            for kept in self._all_kept:
                load, counted = kept.load, kept.counted
                if load is not None and load is not counted:
                    news.append(load if counted is None else load - counted)
                    kept.counted = load
        return torch.stack([load.to(news[0].device) for load in news]).sum(0) if news else None

    def __reduce__(self) -> tuple:
        return LayerState, ()


def _untaken(ref: weakref.ref[LossRecord]) -> bool:
    record = ref()
    return record is not None and record.loss is not None


def _in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active, whose tensors are invalid after it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_left_its_transform(loss: Tensor) -> bool:
    """Whether a loss comes from a forward pass inside a transform of ``torch.func`` that has ended."""
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(loss):
        return False
    dead = torch._C._functorch.is_dead_tensor_wrapper(loss)  # type: ignore[attr-defined]  # not in torch's stub
    return dead or not torch._C._are_functorch_transforms_active()


def recomputing() -> bool:
    """Whether a backward pass is running: a forward pass is then the recomputation of activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def warn_inside_function() -> None:
    """Warns if a custom ``autograd.Function`` runs the forward pass: it turns gradients off, though it trains."""
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    if frame is not None:
        warnings.warn(
            "the training forward of a sparse layer stores no auxiliary losses and counts no load for loss-free "
            f"balancing, because gradients are off inside the autograd.Function {frame.f_locals['cls'].__qualname__}; "
            "of activation checkpointing (CheckpointFunction) use use_reentrant=False",
            stacklevel=2,
        )
