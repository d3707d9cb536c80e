"""Zero-shot classification: each class is a text feature, and an image is assigned to the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..checks import check
from ..clip.inputs import CheckedTokenizer
from ..moe.evaluation import evaluating
from ..precision import Precision, autocast
from ..progress import progress
from .datasets import Template
from .encode import device_of, encode_images, in_batches
from .retrieval import check_finite
from .shares import Share

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
    share: Share | None = None,
    classifier: Tensor | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy, as fractions of 1.

    Args:
        model: open_clip's CLIP, dense or sparse, on its device.
        samples: (image, class index) pairs. In a distributed evaluation, those of this process's batches.
        classes: one name per class.
        tokenizer: the model's, texts to token ids [B, context_length].
        preprocess: image to tensor [3, height, width]; None if the images are tensors already.
        templates: functions of a class name, or strings with the placeholder ``{}``.
        batch_size: images, or texts, in a batch.
        precision: fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights).
        show_progress: a progress bar.
        share: this process's share of a distributed evaluation, which returns the same on every process.
        classifier: of these classes, as ``zero_shot_classifier`` returns it; None computes it.

    Returns:
        ``top1``, ``top5`` (top-N with N < 5 classes), ``chance`` (of top1), ``images``, ``classes``.

    Raises:
        ValueError: no images, a template without ``{}``, or a class index without a name.
        NonFiniteFeatures: a feature is NaN or infinite.
    """
    share = share or Share()
    labels: list[int] = []

    def images() -> Iterator[Tensor]:
        for image, label in progress(samples, "classifying", "images", show=show_progress):
            name = f"the class of image {len(labels)}"
            check(name, label, 0 <= label < len(classes), f"0 to {len(classes) - 1}, the number of a class name")
            labels.append(label)
            yield image if preprocess is None else preprocess(image)

    if classifier is None:
        classifier = zero_shot_classifier(model, classes, tokenizer, templates, batch_size, precision, share)
    image_features = encode_images(model, images(), batch_size, precision, share)
    check_finite("image_features", image_features)
    check_finite("classifier", classifier)
    truth = torch.tensor([label for batch in share.join(list(in_batches(labels, batch_size))) for label in batch])
    best = (image_features @ classifier).topk(min(max(TOP_K), len(classes)), dim=1).indices
    hits = best == truth[:, None]
    accuracy = {f"top{k}": hits[:, :k].any(1).double().mean().item() for k in TOP_K}
    return {**accuracy, "chance": 1 / len(classes), "images": len(truth), "classes": len(classes)}


def zero_shot_classifier(
    model: nn.Module,
    classes: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
    templates: Sequence[Template] = TEMPLATES,
    batch_size: int = 64,
    precision: Precision = "fp32",
    share: Share | None = None,
) -> Tensor:
    """The mean features of the prompts of each class, normalized, [D, classes] in float32 on the CPU (open_clip's
    ``build_zero_shot_classifier``). The arguments are those of ``zero_shot``; every process passes all classes."""
    for template in templates:
        is_complete = not isinstance(template, str) or "{}" in template
        check("templates", template, is_complete, "a function, or text with {} for the class name")
    share = share or Share()
    at_once = max(1, batch_size // len(templates))
    device, checked = device_of(model), CheckedTokenizer(tokenizer, model)

    def columns_of(names: list[str]) -> Tensor:
        columns = open_clip.build_zero_shot_classifier(
            model, checked, names, list(templates), num_classes_per_batch=None, device=device
        )
        return columns.float().cpu()

    with evaluating(model), autocast(precision, device):
        mine = share.each(in_batches(share.part(classes, at_once), at_once), columns_of, lambda: list(classes[:1]))
    return torch.cat(share.join(mine), dim=1)
