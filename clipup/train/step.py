"""One optimizer step on one batch, or on several batches with the memory of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..clip.towers import unwrapped
from ..moe.global_batch import StepCounting
from ..moe.layer import aux_loss
from ..moe.metrics import moe_metrics
from ..moe.selection_bias import forget_loads, update_selection_bias
from ..precision import Precision, autocast, image_dtype
from .forward import attention_kernel, forward
from .objectives.objective import SCALES, Batch, Objective
from .parallel.ranks import Ranks
from .parallel.sharding import (
    batch_statistics,
    clip_gradients,
    finish_gradients,
    gradient_norm,
    synchronize_gradients,
)

LOGIT_SCALE_MAX = math.log(100)
"""The logarithm of the logit scale is kept between 0 and log(100), as in CLIP."""
Layers = dict[str, dict[str, Tensor]]
"""Metrics by layer and name."""


class StepLosses(NamedTuple):
    """0-d tensors on the device, without graph."""

    terms: dict[str, Tensor]
    """Those of the objective by name, weighted."""
    aux: Tensor
    """Weighted losses of the sparse layers; 0 for a dense model."""
    logit_scale: Tensor
    """The factor in front of the cosine in the forward pass."""
    routing: Layers
    """Metrics of the sparse layers, means over the batches; empty unless they were asked for."""

    @property
    def total(self) -> Tensor:
        """The sum that was minimized."""
        return sum(self.terms.values()) + self.aux

    def scalars(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {**self.terms, "aux": self.aux, "logit_scale": self.logit_scale}

    def record(self, ranks: Ranks) -> dict[str, Any]:
        """All numbers of the step as Python's, means over ranks, read from the device in one transfer.

        Returns:
            ``loss`` and the other scalars by name and, for a sparse model, the means of the layers' scalars over the
            layers, and under ``layers`` all metrics of each layer.
        """
        scalars = {"loss": self.total, **self.scalars()}
        tensors = [*scalars.values(), *(tensor for values in self.routing.values() for tensor in values.values())]
        flat = torch.cat([tensor.detach().float().reshape(-1).to(ranks.device) for tensor in tensors])
        numbers = iter(ranks.mean(flat).tolist())

        def read(tensors: dict[str, Tensor]) -> dict[str, Any]:
            """Floats, and lists of vectors'."""
            return {
                name: [next(numbers) for _ in tensor] if tensor.dim() else next(numbers)
                for name, tensor in tensors.items()
            }

        record = read(scalars)
        layers = {name: read(values) for name, values in self.routing.items()}
        if layers:
            for key, value in next(iter(layers.values())).items():
                if isinstance(value, float):
                    record[key] = sum(values[key] for values in layers.values()) / len(layers)
            record["layers"] = layers
        return record


class StepResult(NamedTuple):
    """The result of a step."""

    losses: StepLosses
    applied: bool
    """Whether the step changed the weights."""
    gradient_norm: Tensor
    """[] on the device, before clipping."""
    loss_scale: float
    """The gradient scaler's factor for the next step; 0 without a scaler."""


class TrainStep:
    """Forward, backward, update. ``step([batch])`` or, for accumulation, ``step([batch, batch, ...])``.

    Accumulation is open_clip's (GradCache, arXiv 2101.06983): features of all batches without gradient, then each
    batch's forward again with gradient, against the cached features of the others. Unlike there, the second forward
    draws the same random numbers as the first, and the logit scale's gradient is counted once, so that the step equals
    one on a single large batch. Routing capacity and the layers' losses are per batch; the losses are averaged.

    A step whose gradient norm is NaN or infinite is not applied: weights, optimizer, selection bias and the statistics
    of batch norms keep their values (``applied``). All ranks have the same gradient, so all of them decide the same.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: Precision = "fp32",
        grad_clip_norm: float | None = None,
        world_size: int = 1,
        seed_batch: Callable[[int], object] = torch.manual_seed,
    ) -> None:
        """
        Args:
            model: as ``parallel.wrapped`` returned it.
            world_size: number of ranks.
            seed_batch: called with a batch's index before each of its forward passes, to seed the random numbers in it.
        """
        self.model, self.module, self.objective = model, unwrapped(model), objective
        self.optimizer, self.grad_clip_norm = optimizer, grad_clip_norm
        self.device, self.world_size, self.seed_batch = device, world_size, seed_batch
        self.precision: Precision = precision
        self.scaler = torch.amp.GradScaler(device.type) if precision == "amp" else None
        self._statistics = batch_statistics(self.module)

    def __call__(self, batches: Sequence[Batch], measure_routing: bool = False) -> StepResult:
        """measure_routing: whether the losses have the sparse layers' metrics."""
        self._measure_routing = measure_routing
        self.optimizer.zero_grad()
        statistics = [buffer.clone() for buffer in self._statistics]
        on_device = [self._to_device(*batch) for batch in batches]
        with attention_kernel(self.module, self.device, self.precision):
            losses = self._plain(*on_device) if len(on_device) == 1 else self._accumulated(on_device)
        norm = self._update()
        applied = bool(norm.isfinite())
        if not applied:
            self._undo_forward(statistics)
        return StepResult(losses, applied, norm, 0.0 if self.scaler is None else self.scaler.get_scale())

    def _plain(self, batch: Batch) -> StepLosses:
        targets = self._targets([batch])
        self.seed_batch(0)
        with autocast(self.precision, self.device):
            output = forward(self.model, *batch)
            terms = self.objective.terms(output, targets)
        return self._backward(terms, aux_loss(self.module), output)

    def _accumulated(self, batches: Sequence[Batch]) -> StepLosses:
        targets = self._targets(batches)
        cached, counting = [], StepCounting(self.module)
        with torch.no_grad(), autocast(self.precision, self.device):
            for index, batch in enumerate(batches):
                self.seed_batch(index)
                output = forward(self.module, *batch)  # whose memory the next pass of a model in CUDA graphs takes
                cached.append({name: value.clone() for name, value in output.items()})
                counting.add()
        of_batches: list[StepLosses] = []
        with counting.used():
            for index, batch in enumerate(batches):
                self.seed_batch(index)
                last = index == len(batches) - 1
                synchronize_gradients(self.model, last)
                of_batches.append(self._accumulate(batch, cached, index, targets, last))
        terms = {
            name: torch.stack([losses.terms[name] for losses in of_batches]).mean() for name in of_batches[0].terms
        }
        aux = torch.stack([losses.aux for losses in of_batches]).sum()
        routing = {
            name: {key: torch.stack([losses.routing[name][key] for losses in of_batches]).mean(0) for key in values}
            for name, values in of_batches[0].routing.items()
        }
        return StepLosses(terms, aux, of_batches[-1].logit_scale, routing)

    def _accumulate(
        self,
        batch: Batch,
        cached: Sequence[dict[str, Tensor]],
        index: int,
        targets: dict[str, Tensor],
        last: bool,
    ) -> StepLosses:
        """Forward and backward of one accumulated batch against the cached features of the others. The scales get their
        gradient from the last batch."""
        with autocast(self.precision, self.device):
            output = forward(self.model, *batch)
            parts = [*cached[:index], output, *cached[index + 1 :]]
            whole = {name: torch.cat([part[name] for part in parts]) for name in self.objective.per_pair}
            scales = {name: output[name] for name in SCALES if name in output}
            terms = self.objective.terms({**whole, **(scales if last else _detached(scales))}, targets)
        return self._backward(terms, aux_loss(self.module) / len(cached), output)

    @torch.no_grad()
    def _targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        with autocast(self.precision, self.device):
            return self.objective.targets(batches)

    def _backward(self, terms: dict[str, Tensor], aux: Tensor, output: dict[str, Tensor]) -> StepLosses:
        """Runs backward on one batch and returns its losses."""
        loss = sum(terms.values()) + aux
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        routing = moe_metrics(self.module) if self._measure_routing else {}
        for values in routing.values():
            del values["expert_indices"]  # of every token
        return StepLosses(_detached(terms), aux.detach(), output["logit_scale"].detach(), routing)

    def _update(self) -> Tensor:
        """Applies the gradient if it is finite, and returns its norm before clipping. Waits for the device."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        finish_gradients(self.module, self.world_size)
        norm = gradient_norm(self.module, self.device)
        if bool(norm.isfinite()):
            if self.grad_clip_norm is not None:
                clip_gradients(self.module, self.grad_clip_norm, norm)
            try:
                if self.scaler is None:
                    self.optimizer.step()
                else:
                    self.scaler.step(self.optimizer)
            except KeyError as error:  # optimizers create the whole state of a parameter or nothing of it
                raise ValueError(
                    f"opt_kwargs: with it, or with opt or momentum, the optimizer needs {error} of every parameter, "
                    "and the checkpoint does not hold it; resume with the former values, or start a new run from the "
                    "weights with pretrained"
                ) from error
            update_selection_bias(self.module)
            logit_scale = self.module.get_parameter("logit_scale")
            if logit_scale.requires_grad:
                with torch.no_grad():
                    logit_scale.clamp_(0, LOGIT_SCALE_MAX)
        if self.scaler is not None:
            self.scaler.update()
        return norm

    @torch.no_grad()
    def _undo_forward(self, statistics: list[Tensor]) -> None:
        """Undoes what the forward pass of a step that is not applied has changed in the model."""
        forget_loads(self.module)
        for buffer, before in zip(self._statistics, statistics, strict=True):
            buffer.copy_(before)

    def _to_device(self, images: Tensor, texts: Tensor) -> Batch:
        images = images.to(device=self.device, dtype=image_dtype(self.precision), non_blocking=True)
        return images, texts.to(device=self.device, non_blocking=True)


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
