"""One optimizer step on one batch, or on several with the memory of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..moe.layer import aux_loss, moe_layers
from ..moe.selection_bias import forget_loads, update_selection_bias
from ..precision import Precision, autocast, image_dtype
from .attention import attention_kernel
from .objectives import LOGIT_SCALE_MAX, MultiPositiveClipLoss, features_of
from .rng import set_torch_state, torch_state

Batch = tuple[Tensor, Tensor]
_FEATURES = ("image_features", "text_features")
_SCALES = ("logit_scale", "logit_bias")


class StepLosses(NamedTuple):
    """0-d tensors on the device, without graph."""

    contrastive: Tensor
    """With a CoCa also its captioning loss, both weighted."""
    aux: Tensor
    """Weighted losses of the sparse layers; 0 for a dense model."""
    logit_scale: Tensor
    """The factor in front of the cosine, at the forward."""
    distill: Tensor | None = None
    """Cross-entropy with the teacher's similarities as targets; None without a teacher."""

    @property
    def total(self) -> Tensor:
        """What was minimised."""
        total = self.contrastive + self.aux
        return total if self.distill is None else total + self.distill

    def scalars(self) -> dict[str, Tensor]:
        """The losses there are, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def _per_pair(output: dict[str, Tensor]) -> list[str]:
    """What a forward gives for every pair: features, and a CoCa's logits and labels of captions."""
    return [name for name in output if name not in _SCALES]


def drops_by_position(model: nn.Module) -> bool:
    """Whether which tokens a layer drops in training depends on their place in the batch."""
    configs = (layer.config for layer in moe_layers(model).values())
    return any(config.capacity_factor is not None and not config.priority for config in configs)


class TrainStep:
    """Forward, backward, update. ``step([batch])`` or, for accumulation, ``step([batch, batch, ...])``.

    Accumulation is that of open_clip (GradCache, arXiv 2101.06983): features of all batches without gradient, then each
    batch's forward again with gradient, against the cached features of the others. Unlike there, the second forward
    draws the random numbers of the first, and the logit scale's gradient is counted once, so the step is that of one
    big batch. Routing capacity and the layers' losses are per batch; the losses are averaged.

    **Places in the batch.** Under a capacity an expert's slots go to tokens by position, so what is dropped depends on
    a sample's place in the batch. If the image and the text of a pair had the same place, both towers could tell it
    from what they lack, and would learn to match places instead of contents: the loss falls far below chance even on
    unrelated images and texts, and all of that is lost in evaluation. So the text tower gets the texts in a random
    order.

    **Gradients that are not finite.** A step whose gradient norm is NaN or infinite is not applied: weights, optimizer,
    selection bias and the statistics of batch norms stay as they were (``applied``). Ranks have the same gradient, so
    all of them decide the same.

    With a ``teacher``, ``loss`` is open_clip's DistillClipLoss, and the teacher sees every batch as the model does.
    (open_clip_train refuses to accumulate then; here the teacher's features of all batches are kept.)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: Precision = "fp32",
        grad_clip_norm: float | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self.loss = loss
        self.optimizer = optimizer
        self.device = device
        self.precision: Precision = precision
        self.grad_clip_norm = grad_clip_norm
        self.scaler = torch.amp.GradScaler(device.type) if precision == "amp" else None
        self.applied = True
        """Whether the last step changed the weights."""
        self.gradient_norm = torch.zeros((), device=device)
        """Norm of the last step's gradient, before clipping."""
        self._statistics = _batch_statistics(self.module)

    def __call__(self, batches: Sequence[Batch]) -> StepLosses:
        self.optimizer.zero_grad()
        statistics = [buffer.clone() for buffer in self._statistics]
        on_device = [self._to_device(*batch) for batch in batches]
        with attention_kernel(self.module, self.device, self.precision):
            losses = self._plain(*on_device[0]) if len(on_device) == 1 else self._accumulated(on_device)
        self.applied = self._update()
        if not self.applied:
            self._forget(statistics)
        return losses

    def _plain(self, images: Tensor, texts: Tensor) -> StepLosses:
        with autocast(self.precision, self.device):
            output = self._forward(self.model, images, texts)
            terms = self._contrastive(output, output, texts, self._taught([(images, texts)]))
        aux = aux_loss(self.module)
        self._backward(sum(terms) + aux)
        return StepLosses(terms[0].detach(), aux.detach(), output["logit_scale"].detach(), *_detached(terms[1:]))

    def _accumulated(self, batches: list[Batch]) -> StepLosses:
        cached, states = [], []
        with torch.no_grad(), autocast(self.precision, self.device):
            for images, texts in batches:
                states.append(torch_state(self.device))
                cached.append(self._forward(self.module, images, texts))
            taught = self._taught(batches)
        losses = []
        all_texts = torch.cat([texts for _, texts in batches])
        for index, (images, texts) in enumerate(batches):
            last = index == len(batches) - 1
            set_torch_state(states[index], self.device)
            with nullcontext() if last else self._without_sync():
                with autocast(self.precision, self.device):
                    output = self._forward(self.model, images, texts)
                    around = [*cached[:index], output, *cached[index + 1 :]]
                    features = {name: torch.cat([part[name] for part in around]) for name in _per_pair(output)}
                    scales = output if last else {name: value.detach() for name, value in output.items()}
                    terms = self._contrastive(features, scales, all_texts, taught)
                aux = aux_loss(self.module) / len(batches)
                self._backward(sum(terms) + aux)
            losses.append((aux.detach(), *_detached(terms)))
        auxes, *means = map(torch.stack, zip(*losses, strict=True))
        contrastive, *distill = (mean.mean() for mean in means)
        return StepLosses(contrastive, auxes.sum(), output["logit_scale"].detach(), *distill)

    def _forward(self, model: nn.Module, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """The model's output; row i of both features belongs to pair i."""
        if not drops_by_position(self.module):
            return features_of(model(images, texts))
        order = torch.randperm(len(texts)).to(texts.device)
        output = features_of(model(images, texts[order]))
        output["text_features"] = output["text_features"][order.argsort()]
        return output

    @torch.no_grad()
    def _taught(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The teacher's features of all batches and its logit scale, as DistillClipLoss calls them; {} without one."""
        if self.teacher is None:
            return {}
        outputs = [features_of(self.teacher(images, texts)) for images, texts in batches]
        features = {f"dist_{name}": torch.cat([output[name] for output in outputs]) for name in _FEATURES}
        return {**features, "dist_logit_scale": outputs[0]["logit_scale"]}

    def _contrastive(
        self, features: dict[str, Tensor], scales: dict[str, Tensor], texts: Tensor, taught: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The contrastive loss and, with a teacher, the distillation loss."""
        inputs = {name: features[name] for name in _per_pair(features)}
        if isinstance(self.loss, MultiPositiveClipLoss):
            inputs["texts"] = texts
        terms = self.loss(**inputs, **{name: scales[name] for name in _SCALES if name in scales}, **taught)
        return terms if isinstance(terms, tuple) else (terms,)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _update(self) -> bool:
        """Whether the gradient was finite, and with it the step applied. Waits for the device to know."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        finite = bool(self.gradient_norm.isfinite())
        if finite:
            if self.grad_clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.grad_clip_norm, self.gradient_norm)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
            update_selection_bias(self.module)
            with torch.no_grad():
                self.module.logit_scale.clamp_(0, LOGIT_SCALE_MAX)
        if self.scaler is not None:
            self.scaler.update()
        return finite

    @torch.no_grad()
    def _forget(self, statistics: list[Tensor]) -> None:
        """Undoes what the forward pass of a step that is not applied has left in the model."""
        forget_loads(self.module)
        for buffer, before in zip(self._statistics, statistics, strict=True):
            buffer.copy_(before)

    def _to_device(self, images: Tensor, texts: Tensor) -> Batch:
        images = images.to(device=self.device, dtype=image_dtype(self.precision), non_blocking=True)
        return images, texts.to(device=self.device, non_blocking=True)

    def _without_sync(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()


def _batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of batch norms, which a forward pass in training changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _detached(terms: Iterable[Tensor]) -> list[Tensor]:
    return [term.detach() for term in terms]
