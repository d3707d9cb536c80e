"""Zero-shot classification: each class is a text feature, and an image is assigned to the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..clip.inputs import CheckedTokenizer
from ..moe.evaluation import evaluating
from ..precision import Precision, autocast
from ..progress import progress
from .datasets import Template
from .encode import device_of, encode_images

TEMPLATES = open_clip.SIMPLE_IMAGENET_TEMPLATES
"""open_clip's seven short prompts."""
TOP_K = (1, 5)


def zero_shot(
    model: nn.Module,
    samples: Iterable[tuple[Any, int]],
    classes: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    preprocess: Callable[[Any], Tensor] | None = None,
    templates: Sequence[Template] = TEMPLATES,
    batch_size: int = 64,
    precision: Precision = "fp32",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Zero-shot accuracy, as fractions of 1.

    Args:
        model: open_clip's CLIP, dense or sparse, on its device.
        samples: (image, class index) pairs.
        classes: one name per class.
        preprocess: image to tensor [3, height, width]; None if the images are tensors already.
        templates: functions of a class name, or strings with the placeholder ``{}``.

    Returns:
        ``top1``, ``top5`` (top-N with N < 5 classes), ``chance`` (of top1), ``images``, ``classes``.

    Raises:
        ValueError: no images, no classes, no templates, or a class index without a name.
    """
    for name, value in (("classes", classes), ("templates", templates)):
        if not value:
            raise ValueError(f"{name} is empty; expected at least one")
    labels: list[int] = []

    def images() -> Iterator[Tensor]:
        for image, label in progress(samples, "classifying", "images", show=show_progress):
            if not 0 <= label < len(classes):
                raise ValueError(f"image {len(labels)} has class {label}, but there are {len(classes)} class names")
            labels.append(label)
            yield image if preprocess is None else preprocess(image)

    image_features = encode_images(model, images(), batch_size, precision)
    device = device_of(model)
    with evaluating(model), autocast(precision, device):
        classifier = open_clip.build_zero_shot_classifier(
            model,
            CheckedTokenizer(tokenizer, model),
            classnames=list(classes),
            templates=list(templates),
            num_classes_per_batch=max(1, batch_size // len(templates)),
            device=device,
        )
    best = (image_features @ classifier.float().cpu()).topk(min(max(TOP_K), len(classes)), dim=1).indices
    hits = best == torch.tensor(labels)[:, None]
    accuracy = {f"top{k}": hits[:, :k].any(1).double().mean().item() for k in TOP_K}
    return {**accuracy, "chance": 1 / len(classes), "images": len(labels), "classes": len(classes)}
