"""The teacher of a run with distillation."""

from __future__ import annotations

import torch
from torch import nn

from ..clip import inputs
from ..models import factory, model_names
from ..precision import Precision

_EQUAL = {
    "image size": inputs.image_size,
    "normalization of images": inputs.image_normalization,
    "text length": inputs.text_length,
    "vocabulary size": inputs.vocabulary_size,
}
"""What teacher and student must have in common, because both get the same batches."""


def create_teacher(
    name: str, pretrained: str | None, student: nn.Module, device: torch.device, precision: Precision
) -> nn.Module:
    """The model that ``name`` and ``pretrained`` select, in evaluation mode and frozen.

    Raises:
        ValueError: it would have random weights, or takes other images or texts than the student.
    """
    model_names.refuse_random_weights("distill_pretrained", name, pretrained)
    teacher, *_ = factory.create_model_and_transforms(
        name, pretrained, precision=precision, device=device, output_dict=True
    )
    for what, of in _EQUAL.items():
        theirs, ours = of(teacher), of(student)
        if theirs != ours and None not in (theirs, ours):
            raise ValueError(
                f"distill_model={name!r} has {what} {theirs}, the model that it teaches has {ours}, and both get the "
                "same batches; choose a teacher that matches the model"
            )
    return teacher.eval().requires_grad_(False)
