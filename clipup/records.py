"""What a sparse layer remembers of its forwards: losses and loads that nobody has taken yet, and how the last tokens
were routed.

A loss has to outlive the forward that made it, because the training loop adds it to its own loss later, but it must not
outlive the graph it belongs to. So a record of a loss ends
- when ``aux_loss`` takes it, or
- when a backward pass has gone through the layer's output (the graph is spent), or
- when it is not the layer's newest and the output of its forward is gone (nobody can train on that forward any more).
"""

from __future__ import annotations

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
    experts: Tensor
    """[T, K] int32."""
    picks: Tensor
    """[K, E] int32."""
    offsets: Tensor
    """[E+1] int32: Plan.offsets; the last is how many (token, choice) pairs got a slot."""
    mean_probs: Tensor
    """[E] float32."""
    z_loss: Tensor
    """[] float32."""


class Records:
    """The memory of one layer. A copy of it, by deepcopy or pickle, is empty: graphs belong to the original."""

    def __init__(self) -> None:
        self.last_routing: LastRouting | None = None
        self._newest: LossRecord | None = None
        self._earlier: list[weakref.ref[LossRecord]] = []
        self._load: Tensor | None = None

    def keep_routing(self, routing: Routing) -> None:
        gating = routing.gating
        self.last_routing = LastRouting(
            logits=routing.noisy_logits.detach(),
            mask=routing.mask,
            experts=gating.experts,
            picks=gating.picks,
            offsets=routing.plan.offsets,
            mean_probs=gating.mean_probs.detach(),
            z_loss=gating.z_loss.detach(),
        )

    def keep_loss(self, loss: Tensor, output: Tensor) -> None:
        """Keeps the loss of the forward that returns ``output``; under ``torch.compile`` in place of all before."""
        record = LossRecord(loss)
        if not torch.compiler.is_compiling():
            if output.requires_grad:
                output.register_hook(record.drop)
            alive = [ref for ref in self._earlier if _untaken(ref) is not None]
            self._earlier = alive if self._newest is None else [*alive, weakref.ref(self._newest)]
        self._newest = record

    def take_losses(self) -> list[Tensor]:
        """The losses that nobody has taken, which are forgotten here."""
        records = [*(ref() for ref in self._earlier), self._newest]
        self._newest, self._earlier = None, []
        return [loss for loss in (record.take() for record in records if record is not None) if loss is not None]

    def keep_load(self, picks: Tensor) -> None:
        """Adds a forward's picks [K, E] to the load since ``take_load``."""
        load = picks.sum(0)
        self._load = load if self._load is None else self._load + load

    def take_load(self) -> Tensor | None:
        """[E] int64: picks of every expert since the last call, which are forgotten here; None for no forward."""
        load, self._load = self._load, None
        return load

    def __deepcopy__(self, memo: dict) -> Records:
        return Records()

    def __reduce__(self) -> tuple:
        return Records, ()


def _untaken(ref: weakref.ref[LossRecord]) -> LossRecord | None:
    record = ref()
    return None if record is None or record.loss is None else record


def recomputing() -> bool:
    """Whether a backward pass is running, so that a forward now is activation checkpointing's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
