"""CLIP's loss beside that of a teacher's similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.loss import DistillClipLoss
from torch import Tensor, nn

from ...clip import inputs
from ...models import factory, model_names
from ...precision import Precision
from ..parallel.ranks import Ranks
from .multi_positive import MultiPositiveClipLoss
from .objective import FEATURES, Batch, Objective, gathering, named_output
from .options import LossOptions

_EQUAL_IN_TEACHER = {
    "image size": inputs.image_size,
    "normalization of images": inputs.image_normalization,
    "text length": inputs.text_length,
    "vocabulary size": inputs.vocabulary_size,
}
"""What teacher and student must have in common, because both get the same batches."""


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
    def create(cls, options: LossOptions, model: nn.Module, ranks: Ranks, precision: Precision) -> Objective:
        teacher = _create_teacher(options, model, ranks.device, precision)
        return cls(teacher, options.multi_positive, **gathering(options, ranks))

    def targets(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        outputs = [named_output(self.teacher(images, texts)) for images, texts in batches]
        features = {f"dist_{name}": torch.cat([output[name] for output in outputs]) for name in FEATURES}
        targets = {**features, "dist_logit_scale": outputs[0]["logit_scale"]}
        if self.over_distinct is not None:
            targets["captions"] = self.over_distinct.captions(torch.cat([texts for _, texts in batches]))
        return targets

    def terms(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = [output[name] for name in FEATURES]
        of_teacher = {name: target for name, target in targets.items() if name != "captions"}
        contrastive, distill = self.loss(*features, output["logit_scale"], **of_teacher)
        if self.over_distinct is not None:
            contrastive = self.over_distinct(*features, output["logit_scale"], targets["captions"])
        return {"contrastive": contrastive, "distill": distill}


def _create_teacher(options: LossOptions, student: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
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
