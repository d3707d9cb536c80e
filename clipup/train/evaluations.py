"""What a run measures on data of its own: retrieval on ``val_data``, zero-shot accuracy on ImageNet.

All ranks share each of them, through the code of ``clipup eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..data.loaders import load_eval_samples
from ..evaluate.datasets import ClassificationSet, imagenet, imagenet_v2
from ..evaluate.retrieval import evaluate_retrieval
from ..evaluate.shares import Share
from ..evaluate.zero_shot import zero_shot, zero_shot_classifier
from ..precision import Precision
from .options import TrainOptions
from .ranks.distributed import Ranks
from .setup import Built

RETRIEVAL, ZERO_SHOT = "retrieval", "zero_shot"
_READERS = {"imagenet_val": imagenet, "imagenet_v2": imagenet_v2}
"""The options that name data to classify, and what reads them."""
Evaluation = Callable[[nn.Module], dict[str, Any] | None]
"""A function of the model (not wrapped) that returns numbers to record, or None."""


class Validation(NamedTuple):
    """A measurement that is repeated."""

    name: str
    every: int
    """Epochs between two of them; 0 measures at the end of the run only."""
    measure: Evaluation
    """All ranks call it; rank 0 gets the numbers."""


def build_validations(options: TrainOptions, built: Built, precision: Precision, ranks: Ranks) -> list[Validation]:
    """Those that the options ask for; their data are found now, and read when they are measured."""
    share = Share(ranks.rank, ranks.world_size, ranks.gather_patiently, in_step=options.is_sharded)
    common: dict[str, Any] = {"batch_size": options.batch_size, "precision": precision, "share": share}
    validations = []
    if options.val_data is not None:
        measure = _retrieval(options, built, common, ranks.first)
        validations.append(Validation(RETRIEVAL, options.val_frequency, measure))
    if any(getattr(options, name) is not None for name in _READERS):
        measure = _zero_shot(options, built, common, ranks.first)
        validations.append(Validation(ZERO_SHOT, options.zeroshot_frequency, measure))
    return validations


def _retrieval(options: TrainOptions, built: Built, common: dict[str, Any], shown: bool) -> Evaluation:
    preprocess, tokenizer = built.reader(training=False)
    samples = load_eval_samples(str(options.val_data), preprocess, replace(options, dataset_type="auto"), "val_data")
    samples = samples.only(common["share"].part(samples.samples, options.batch_size))
    samples.read_at_once, samples.workers = options.batch_size, options.workers
    common = {"by": "group", "multi_positive": options.multi_positive, "show_progress": shown, **common}

    def measure(model: nn.Module) -> dict[str, Any] | None:
        numbers = evaluate_retrieval(model, samples, tokenizer, **common)
        samples.check_all(common["share"].gather)
        return numbers

    return measure


def _zero_shot(options: TrainOptions, built: Built, common: dict[str, Any], shown: bool) -> Evaluation:
    preprocess, tokenizer = built.reader(training=False)
    paths = {name: getattr(options, name) for name in _READERS}
    sets = {name: _READERS[name](path) for name, path in paths.items() if path is not None}

    def measure(model: nn.Module) -> dict[str, Any]:
        classes, templates = next((each.classes, each.templates) for each in sets.values())
        classifier = zero_shot_classifier(model, classes, tokenizer, templates, **common)
        numbers = {}
        for name, whole in sets.items():
            part: Any = common["share"].part(whole.images, options.batch_size)
            mine = ClassificationSet(part, classes, templates)
            images = mine.samples(preprocess, options.batch_size, options.workers, options.max_image_pixels)
            numbers[name] = zero_shot(
                model, images, classes, tokenizer, classifier=classifier, show_progress=shown, **common
            )
        return numbers

    return measure
