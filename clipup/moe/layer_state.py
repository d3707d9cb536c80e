"""State that a sparse layer keeps between forward passes: untaken losses, load, and how the last tokens were routed.

What a forward leaves belongs to the thread that ran it: its loss is taken, and its routing read, by that thread alone.
Only the load is of the layer as a whole.

A loss has to outlive the forward that made it, because the training loop adds it to its own loss later, but it must not
outlive the graph it belongs to. So a record of a loss ends
- when ``aux_loss`` takes it, or
- when a backward pass has gone through the layer's output (the graph is spent), or
- when the output of its forward is gone (nobody can train on that forward any more), and it is not its thread's newest.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .router import Routing


class LossRecord:
    """The weighted loss of one forward, with its graph; None once it was taken or spent."""

    __slots__ = ("loss", "__weakref__")

    def __init__(self, loss: Tensor) -> None:
        self.loss: Tensor | None = loss

    def take(self) -> Tensor | None:
        loss, self.loss = self.loss, None
        return loss

    def drop(self, gradient: Tensor | None = None) -> None:
        """Also the hook of the layer's output; leaves its gradient as it is."""
        self.loss = None


class LastRouting(NamedTuple):
    """The last forward's routing, detached, as ``moe_metrics`` needs it."""

    logits: Tensor
    """[T, E] float32: what the choices were made from."""
    mask: Tensor | None
    """[T] bool."""
    expert_indices: Tensor
    """[T, K] int32."""
    tokens_per_expert: Tensor
    """[K, E] int32."""
    offsets: Tensor
    """[E+1] int32: Plan.offsets; the last is how many (token, choice) pairs got a slot."""
    mean_probs: Tensor
    """[E] float32."""
    z_loss: Tensor
    """[] float32."""


class _Kept:
    """What the forwards of one thread have left for ``aux_loss`` and ``update_selection_bias``.

    Only that thread writes to ``waiting`` and ``load``, and only ``Records.take_load`` to ``counted``. So no thread
    waits for another, and nothing is lost between them.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.waiting: list[weakref.ref[LossRecord]] = []
        self.load: Tensor | None = None
        """[E] int64: tokens per expert in all forwards so far."""
        self.counted: Tensor | None = None
        """The value of ``load`` that ``take_load`` has seen last."""

    def untaken(self) -> int:
        return sum(_untaken(ref) for ref in self.waiting)

    def is_over(self) -> bool:
        """Whether the thread has ended and left nothing."""
        return not self.thread.is_alive() and self.load is self.counted and not self.untaken()


class _State:
    """The calling thread's part of the records. It goes with the thread; what others may ask for is in ``kept``."""

    def __init__(self) -> None:
        self.ran_layer = False
        self.last_routing: LastRouting | None = None
        self.newest: LossRecord | None = None
        self.kept = _Kept()


class _OfThread(threading.local):
    """``state`` for every thread. It is an object of its own because ``torch.compile`` loses what is assigned to
    attributes of a subclass of ``threading.local``."""

    def __init__(self, everyone: list[_Kept], lock: threading.Lock) -> None:
        self.state = _State()
        with lock:
            everyone[:] = [kept for kept in everyone if not kept.is_over()] + [self.state.kept]


class Records:
    """The records of one layer. A copy of it, by deepcopy or pickle, is empty: graphs belong to the original."""

    def __init__(self) -> None:
        self._everyone: list[_Kept] = []
        self._lock = threading.Lock()
        self._threads = _OfThread(self._everyone, self._lock)

    @property
    def last_routing(self) -> LastRouting | None:
        """How the calling thread's last forward routed its tokens."""
        return self._threads.state.last_routing

    @last_routing.setter
    def last_routing(self, routing: LastRouting | None) -> None:
        self._threads.state.last_routing = routing

    def keep(self, routing: Routing, output: Tensor, loss: Tensor | None, counts_load: bool) -> None:
        """Keeps what the forward that returns ``output`` leaves; a loss is None where there is none to train on.

        Under ``torch.compile`` also inside a checkpointed region, of which only the first forward keeps anything.
        """
        if torch.compiler.is_dynamo_compiling():
            from torch._dynamo.utils import _disable_side_effect_safety_checks_for_current_subtracer as unchecked

            unchecked(self._keep, routing, output, loss, counts_load)
        else:
            self._keep(routing, output, loss, counts_load)

    def _keep(self, routing: Routing, output: Tensor, loss: Tensor | None, counts_load: bool) -> None:
        self._threads.state.ran_layer = True
        if not _in_transform():
            self._keep_routing(routing)
            if counts_load:
                load = routing.gating.tokens_per_expert.sum(0)
                kept = self._threads.state.kept
                kept.load = load if kept.load is None else kept.load + load
        if loss is not None and loss.requires_grad:
            self._keep_loss(loss, output)

    def _keep_routing(self, routing: Routing) -> None:
        gating = routing.gating
        self._threads.state.last_routing = LastRouting(
            logits=routing.noisy_logits.detach(),
            mask=routing.mask,
            expert_indices=gating.expert_indices,
            tokens_per_expert=gating.tokens_per_expert,
            offsets=routing.plan.offsets,
            mean_probs=gating.mean_probs.detach(),
            z_loss=gating.z_loss.detach(),
        )

    def _keep_loss(self, loss: Tensor, output: Tensor) -> None:
        """Under ``torch.compile`` in place of all before."""
        record, mine = LossRecord(loss), self._threads.state
        if not torch.compiler.is_compiling():
            if output.requires_grad:
                output.register_hook(record.drop)
            mine.kept.waiting = [*filter(_untaken, mine.kept.waiting), weakref.ref(record)]
        mine.newest = record

    def take_losses(self) -> list[Tensor]:
        """The losses that the calling thread's forwards left and nobody has taken; they are forgotten here."""
        mine = self._threads.state
        records = [*(ref() for ref in mine.kept.waiting), mine.newest]
        mine.newest, mine.kept.waiting = None, []
        losses = [record.take() for record in records if record is not None]
        return [loss for loss in losses if loss is not None and not _has_left_its_transform(loss)]

    def untaken_elsewhere(self) -> int:
        """How many losses of other threads the caller may believe to be its own: those of threads that have ended, and
        those of all where the caller has not run the layer itself."""
        mine = self._threads.state
        with self._lock:
            others = [kept for kept in self._everyone if kept is not mine.kept]
        return sum(kept.untaken() for kept in others if not (mine.ran_layer and kept.thread.is_alive()))

    def take_load(self) -> Tensor | None:
        """[E] int64: tokens per expert in the forwards of all threads since the last call; None for no forward."""
        news = []
        with self._lock:
            for kept in self._everyone:
                load = kept.load
                if load is not kept.counted:
                    news.append(load if kept.counted is None else load - kept.counted)
                    kept.counted = load
        return torch.stack([load.to(news[0].device) for load in news]).sum(0) if news else None

    def __deepcopy__(self, memo: dict) -> Records:
        return Records()

    def __reduce__(self) -> tuple:
        return Records, ()


def _untaken(ref: weakref.ref[LossRecord]) -> bool:
    record = ref()
    return record is not None and record.loss is not None


def _in_transform() -> bool:
    """Whether a transform of ``torch.func`` is active, whose tensors mean nothing after it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_left_its_transform(loss: Tensor) -> bool:
    """Whether a loss is of a forward inside a transform of ``torch.func`` that has ended."""
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(loss):
        return False
    return torch._C._functorch.is_dead_tensor_wrapper(loss) or not torch._C._are_functorch_transforms_active()


def recomputing() -> bool:
    """Whether a backward pass is running, so that a forward now is activation checkpointing's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
