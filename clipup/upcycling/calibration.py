"""Calibration: fits re-initialized experts to the outputs of the dense MLPs, layer by layer, before training.

Each layer is fitted on the inputs that it has in the dense model. Layers are therefore independent of each other, and
one pass over the data with the memory of one batch suffices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..moe.evaluation import evaluating_dropless
from ..moe.layer import SparseMoE, moe_layers
from .clusters import Batch, run_batches
from .upcycle import upcycle


def calibrate(model: nn.Module, dense: nn.Module, batches: Iterable[Batch], lr: float = 1e-3) -> dict[str, list[float]]:
    """Fits the experts of an upcycled model in place to the dense MLPs that they were made from.

    For every batch and layer: one step of Adam (betas 0.9 and 0.999, no weight decay) on the relative squared error of
    the layer's output, where x is the input of the dense MLP. No tokens are dropped and the router is not trained::

        sum_t |moe(x_t) - mlp(x_t)|^2 / sum_t |mlp(x_t)|^2

    A summary of CLIP-UP (arXiv 2502.00965) mentions "knowledge-distillation-based parameter initialization"; this
    objective is our choice (FitNets, arXiv 1412.6550, fits hidden layers in the same way).

    Args:
        model: the result of ``upcycle(dense, ...)``, with re-initialized experts (``reinit_ratio``).
        dense: the dense model that it was made from; it is not changed.
        batches: (images [B, 3, H, W], texts [B, context_length]) on any device, one step per layer for each. Texts are
            None for a model without a text tower.
        lr: Adam's learning rate, constant.

    Returns:
        The error at every step, before its update, by layer name.

    Raises:
        TypeError: they are models of transformers, which are not supported.
        ValueError: ``model`` was not upcycled or not from ``dense``, all its experts are frozen, or there are no
            batches.
        FloatingPointError: the error of a layer became NaN or infinite.
    """
    checks.module("dense", dense)
    checks.positive_number("lr", lr)
    config, students = getattr(model, "moe_config", None), moe_layers(model)
    if config is None or not students:
        raise ValueError("model has no sparse layers from clipup.upcycle, so there is nothing to calibrate")
    plain = config.replace(
        num_experts=1,
        top_k=1,
        granularity=1,
        shared_expert=False,
        reinit_ratio=0.0,
        selection_bias="none",
        normalize_gates="before_drop",
        routing="token_choice",
    )
    teacher = upcycle(dense, plain).requires_grad_(False)  # the dense function in sparse layers
    teachers = moe_layers(teacher)
    if list(teachers) != list(students):
        raise ValueError(
            f"model has sparse layers {', '.join(students)}; upcycling dense gives {', '.join(teachers)}: pass the "
            "model that it was upcycled from"
        )
    fits = {name: _Fit(name, layer, lr) for name, layer in students.items() if _experts(layer)}
    for name, fit in fits.items():
        teachers[name].register_forward_hook(fit.step)
    with evaluating_dropless(model):
        run_batches(teacher, batches)
    if not any(fit.errors for fit in fits.values()):
        raise ValueError("nothing was calibrated: batches is empty, or no expert of model has requires_grad=True")
    return {name: fit.errors for name, fit in fits.items()}


class _Fit:
    """The optimization of one layer's experts."""

    def __init__(self, name: str, layer: SparseMoE, lr: float) -> None:
        self.name, self.layer = name, layer
        self.experts = _experts(layer)
        self.optimizer = torch.optim.Adam(self.experts, lr=lr)
        self.errors: list[float] = []

    @torch.enable_grad()
    def step(self, teacher: SparseMoE, inputs: tuple[Any, ...], target: Tensor) -> None:
        """Forward hook of a layer of the teacher: one optimizer step on its input and output."""
        difference = (self.layer(*inputs) - target).float()
        error = difference.square().sum() / target.float().square().sum()
        self.errors.append(error.item())
        if not error.isfinite():
            step = len(self.errors)
            raise FloatingPointError(f"the error of {self.name} is {self.errors[-1]} at step {step}; lower lr")
        error.backward(inputs=self.experts)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _experts(layer: SparseMoE) -> list[nn.Parameter]:
    """The parameters that require a gradient, without the router's."""
    named = layer.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and not name.startswith("router.")]
