"""The losses that training can minimize: one class each, chosen by ``create_objective``.

The losses of the sparse layers are not part of an objective; the step adds them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.loss import DistillClipLoss
from torch import Tensor, nn

from ..clip import inputs
from ..models import factory, model_names
from ..precision import Precision
from .chunked_losses import ChunkedClipLoss, ChunkedSigLipLoss, MultiPositiveClipLoss
from .forward import named_output

if TYPE_CHECKING:
    from .options import TrainOptions
    from .ranks.distributed import Ranks

Batch = tuple[Tensor, Tensor]
"""Images [B, 3, H, W] and texts [B, L]."""
_FEATURES = ("image_features", "text_features")
_EQUAL_IN_TEACHER = {
    "image size": inputs.image_size,
    "normalization of images": inputs.image_normalization,
    "text length": inputs.text_length,
    "vocabulary size": inputs.vocabulary_size,
}
"""What teacher and student must have in common, because both get the same batches."""


class Objective:
    """A loss over image-text pairs, as named terms whose sum is minimized."""

    option: ClassVar[str] = ""
    """The training option that selects it; "" for those that are not selected by an option."""
    per_pair: ClassVar[tuple[str, ...]] = _FEATURES
    """Outputs of the model that it needs, with one row per pair."""
    model_arguments: ClassVar[dict[str, float]] = {}
    """Arguments of open_clip's models that a model with random weights should be created with."""
    takes_bias: ClassVar[tuple[bool, ...]] = (False, True)
    """Whether it can train a model without, and with a logit_bias."""

    @classmethod
    def create(cls, options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        """The objective of a run. ``model``: the one that is trained."""
        return cls(**_gathering(options, ranks))

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """What the loss compares the model's output with, over all batches of a step; computed once, without gradient.

        The usual target, that the image and the text of a pair match, needs nothing.
        """
        return {}

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss by name, weighted, as 0-d tensors.

        Args:
            output: the model's over all batches of the step: ``per_pair``, ``logit_scale``, ``logit_bias`` if any.
            targets: as ``targets`` returned them.
        """
        raise NotImplementedError


class ContrastiveObjective(Objective):
    """CLIP's loss: softmax cross-entropy of every image against all texts, and of every text against all images."""

    def __init__(self, chunk_size: int | None = None, **gathering: Any) -> None:
        """chunk_size: rows of the logits that are computed at once."""
        self.loss = ChunkedClipLoss(chunk_size, **gathering)

    @classmethod
    def create(cls, options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        return cls(options.loss_chunk_size, **_gathering(options, ranks))

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in _FEATURES]
        return {"contrastive": self.loss(*features, output["logit_scale"], output.get("logit_bias"))}


class SigmoidObjective(Objective):
    """SigLIP's loss: a binary decision for every image and text (arXiv 2303.15343)."""

    option = "siglip"
    takes_bias = (True,)
    model_arguments = {"init_logit_scale": math.log(10), "init_logit_bias": -10}
    """Section 3.2 of the paper."""

    def __init__(self, chunk_size: int | None = None, rank: int = 0, world_size: int = 1) -> None:
        """chunk_size: rows of the logits that are computed at once."""
        self.loss = ChunkedSigLipLoss(chunk_size, rank=rank, world_size=world_size)

    @classmethod
    def create(cls, options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        return cls(options.loss_chunk_size, ranks.rank, ranks.world_size)

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in _FEATURES]
        return {"contrastive": self.loss(*features, output["logit_scale"], output["logit_bias"])}


class MultiPositiveObjective(ContrastiveObjective):
    """CLIP's loss in which pairs with equal captions are not negatives of each other (``MultiPositiveClipLoss``)."""

    option = "multi_positive"
    takes_bias = (False,)

    def __init__(self, chunk_size: int | None = None, **gathering: Any) -> None:
        self.loss = MultiPositiveClipLoss(chunk_size, **gathering)

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        return {"captions": self.loss.captions(torch.cat([texts for _, texts in batches]))}

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in _FEATURES]
        return {"contrastive": self.loss(*features, output["logit_scale"], targets["captions"])}


class DistillationObjective(Objective):
    """CLIP's loss, and the mean cross-entropy of the similarities with the softmax of the teacher's as targets, images
    to texts and texts to images, half of each (open_clip's DistillClipLoss).

    With ``multi_positive``, CLIP's loss is that of ``MultiPositiveObjective``; the similarities of equal captions are
    compared with the teacher's like all others. open_clip_train refuses to accumulate with a teacher; here the
    teacher's features of all batches are kept.
    """

    option = "distill_model"
    takes_bias = (False,)

    def __init__(self, teacher: nn.Module, multi_positive: bool = False, **gathering: Any) -> None:
        """teacher: takes the same batches as the model; frozen and in evaluation mode."""
        self.teacher = teacher
        self.loss = DistillClipLoss(cache_labels=True, **gathering)
        self.over_distinct = MultiPositiveClipLoss(**gathering) if multi_positive else None

    @classmethod
    def create(cls, options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        teacher = _create_teacher(options, model, ranks.device, precision)
        return cls(teacher, options.multi_positive, **_gathering(options, ranks))

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        outputs = [named_output(self.teacher(images, texts)) for images, texts in batches]
        features = {f"dist_{name}": torch.cat([output[name] for output in outputs]) for name in _FEATURES}
        targets = {**features, "dist_logit_scale": outputs[0]["logit_scale"]}
        if self.over_distinct is not None:
            targets["captions"] = self.over_distinct.captions(torch.cat([texts for _, texts in batches]))
        return targets

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in _FEATURES]
        of_teacher = {name: target for name, target in targets.items() if name != "captions"}
        contrastive, distill = self.loss(*features, output["logit_scale"], **of_teacher)
        if self.over_distinct is not None:
            contrastive = self.over_distinct(*features, output["logit_scale"], targets["captions"])
        return {"contrastive": contrastive, "distill": distill}


class CoCaObjective(Objective):
    """The contrastive and the captioning loss of a CoCa (arXiv 2205.01917, after eq. 4): open_clip's, with half the
    paper's contrastive loss, and a mean over tokens instead of the sum. The model selects it."""

    own_options = ("coca_caption_loss_weight", "coca_contrastive_loss_weight")
    takes_bias = (False,)
    per_pair = (*_FEATURES, "logits", "labels")
    """The decoder's logits [B, L, V] and the next tokens [B, L] beside the features."""

    def __init__(
        self,
        pad_id: int,
        caption_weight: float,
        contrastive_weight: float,
        chunk_size: int | None = None,
        **gathering: Any,
    ) -> None:
        """pad_id: the token that no loss is computed for. chunk_size: rows of the contrastive logits at once."""
        self.contrastive = ChunkedClipLoss(chunk_size, **gathering)
        self.pad_id, self.caption_weight, self.contrastive_weight = pad_id, caption_weight, contrastive_weight

    @classmethod
    def create(cls, options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        weights = options.coca_caption_loss_weight, options.coca_contrastive_loss_weight
        assert isinstance(model, CoCa)
        return cls(model.pad_id, *weights, options.loss_chunk_size, **_gathering(options, ranks))

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """A term of weight 0 is computed too: DDP needs a gradient, if only zero, of every parameter."""
        contrastive = self.contrastive(*(output[name] for name in _FEATURES), output["logit_scale"])
        logits, labels = output["logits"].flatten(0, 1), output["labels"].flatten()
        caption = F.cross_entropy(logits, labels, ignore_index=self.pad_id)
        return {"contrastive": self.contrastive_weight * contrastive, "caption": self.caption_weight * caption}


_BY_OPTION = (SigmoidObjective, MultiPositiveObjective, DistillationObjective)


def selected(options: TrainOptions) -> type[Objective]:
    """The objective that the options select for a model without a decoder; that of a teacher takes ``multi_positive``
    too."""
    found = [objective for objective in _BY_OPTION if getattr(options, objective.option) not in (None, False)]
    return found[-1] if found else ContrastiveObjective


def create_objective(options: TrainOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
    """The objective that the options and the model select.

    Raises:
        ValueError: the model cannot be trained with it, or an option of another objective is set.
    """
    objective = selected(options)
    if isinstance(model, CoCa):
        if objective.option:
            raise ValueError(
                f"{objective.option} has no captioning loss, which a CoCa's decoder learns from; leave it out"
            )
        objective = CoCaObjective
    else:
        for field in dataclasses.fields(options):
            if field.name in CoCaObjective.own_options and getattr(options, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect on a model without a decoder, which only a CoCa has")
    has_bias = getattr(model, "logit_bias", None) is not None
    if has_bias not in objective.takes_bias:
        arguments = ", ".join(f"{name}={value:.4g}" for name, value in SigmoidObjective.model_arguments.items())
        raise ValueError(
            f"{objective.option or 'the loss of a CoCa'} {'has no' if has_bias else 'needs a'} logit_bias, and this "
            f"model {'has one' if has_bias else 'none'}. Random weights are created as the loss needs it; "
            f"others have a bias if they are created, in Python, with {arguments}"
        )
    return objective.create(options, model, ranks, precision)


def _create_teacher(options: TrainOptions, student: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """The model that the options select, in evaluation mode and frozen.

    Raises:
        ValueError: it would have random weights, or takes other images or texts than the student.
    """
    name, pretrained = factory.name_and_weights(options.distill_model, options.distill_pretrained, "distill_pretrained")
    model_names.refuse_random_weights("distill_pretrained", name, pretrained)
    teacher, *_ = factory.create_model_and_transforms(
        name, pretrained, precision=precision, device=device, output_dict=True
    )
    for what, of in _EQUAL_IN_TEACHER.items():
        theirs, ours = of(teacher), of(student)
        if theirs != ours and None not in (theirs, ours):
            raise ValueError(
                f"distill_model={name!r} has {what} {theirs}, the model that it teaches has {ours}, and both get the "
                "same batches; choose a teacher that matches the model"
            )
    return teacher.eval().requires_grad_(False)


def _gathering(options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    """How open_clip's softmax losses gather the features of several ranks."""
    settings = {"local_loss": options.local_loss, "gather_with_grad": options.gather_with_grad}
    return {**settings, "rank": ranks.rank, "world_size": ranks.world_size}
