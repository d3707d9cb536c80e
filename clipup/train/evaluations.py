"""What a run measures on data of its own: retrieval on ``val_data``, zero-shot accuracy on ImageNet.

All ranks share each of them, through the code of ``clipup eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..data.loaders import load_eval_samples
from ..data.options import TrainingDataOptions
from ..evaluate.datasets import ClassificationSet, imagenet, imagenet_v2
from ..evaluate.retrieval import evaluate_retrieval
from ..evaluate.shares import Share
from ..evaluate.zero_shot import zero_shot, zero_shot_classifier
from ..precision import Precision
from .evaluation_options import EvaluationOptions
from .setup import Built

Evaluation = Callable[[nn.Module], dict[str, Any] | None]
"""A function of the model (not wrapped) that returns numbers to record, or None."""


class Validation(NamedTuple):
    """A measurement that is repeated."""

    name: str
    every: int
    """Epochs between two of them; 0 measures at the end of the run only."""
    measure: Evaluation
    """All ranks call it; rank 0 gets the numbers."""
    results: Callable[[dict[str, Any]], list[dict[str, Any]]]
    """From its numbers to those of the model card, as ``clipup eval`` writes them."""


def validations(
    options: EvaluationOptions,
    reading: TrainingDataOptions,
    built: Built,
    share: Share,
    batch_size: int,
    precision: Precision,
    multi_positive: bool,
) -> list[Validation]:
    """The measurements that options ask for. Their data are found now, and read when they are measured.

    Args:
        reading: how ``val_data`` is read, in the format of its own ending, and by how many workers.
    """
    found = []
    common: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "share": share}
    if options.val_data is not None:
        how = common | {"multi_positive": multi_positive}
        of = {"val_data": options.val_data, "multi_positive": multi_positive}
        measure = _retrieval(options.val_data, reading, built, **how)
        found.append(
            Validation("retrieval", options.val_frequency, measure, lambda numbers: [{**of, "retrieval": numbers}])
        )
    readers = {"imagenet_val": (options.imagenet_val, imagenet), "imagenet_v2": (options.imagenet_v2, imagenet_v2)}
    sets = {name: (root, read(root)) for name, (root, read) in readers.items() if root is not None}
    if sets:
        measure = _zero_shot({name: images for name, (_, images) in sets.items()}, reading, built, **common)
        found.append(
            Validation(
                "zero_shot",
                options.zeroshot_frequency,
                measure,
                lambda numbers: [{"images": sets[name][0], "zero_shot": numbers[name]} for name in numbers],
            )
        )
    return found


def _retrieval(
    val_data: str, reading: TrainingDataOptions, built: Built, share: Share, batch_size: int, **how: Any
) -> Evaluation:
    preprocess, tokenizer = built.reader(training=False)
    samples = load_eval_samples(val_data, preprocess, replace(reading, dataset_type="auto"), "val_data")
    samples = samples.only(share.part(samples.samples, batch_size))
    samples.read_at_once, samples.workers = batch_size, reading.workers
    how |= {"share": share, "batch_size": batch_size, "by": "group", "show_progress": share.index == 0}

    def measure(model: nn.Module) -> dict[str, Any] | None:
        numbers = evaluate_retrieval(model, samples, tokenizer, **how)
        samples.check_all(share.gather)
        return numbers

    return measure


def _zero_shot(
    sets: dict[str, ClassificationSet],
    reading: TrainingDataOptions,
    built: Built,
    share: Share,
    batch_size: int,
    **how: Any,
) -> Evaluation:
    preprocess, tokenizer = built.reader(training=False)
    classes, templates = next((each.classes, each.templates) for each in sets.values())
    how |= {"share": share, "batch_size": batch_size}

    def measure(model: nn.Module) -> dict[str, Any]:
        classifier = zero_shot_classifier(model, classes, tokenizer, templates, **how)
        numbers = {}
        for name, whole in sets.items():
            part: Any = share.part(whole.images, batch_size)
            images = ClassificationSet(part, classes, templates).samples(
                preprocess, batch_size, reading.workers, reading.max_image_pixels
            )
            more = {"classifier": classifier, "show_progress": share.index == 0, **how}
            numbers[name] = zero_shot(model, images, classes, tokenizer, **more)
        return numbers

    return measure
