"""What a run measures on data of its own: retrieval on ``val_data``, zero-shot accuracy on ImageNet.

All ranks share each of them, through the code of ``clipup eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Validations:
    """The measurements that options ask for."""

    options: EvaluationOptions
    reading: TrainingDataOptions
    """How ``val_data`` is read, in the format of its own ending, and by how many workers."""
    multi_positive: bool
    batch_size: int
    precision: Precision
    share: Share
    built: Built

    def create(self) -> list[Validation]:
        """Their data are found now, and read when they are measured."""
        options, validations = self.options, []
        if options.val_data is not None:
            of = {"val_data": options.val_data, "multi_positive": self.multi_positive}
            measure = self._retrieval(options.val_data)
            validations.append(
                Validation("retrieval", options.val_frequency, measure, lambda numbers: [{**of, "retrieval": numbers}])
            )
        sets = {}
        if options.imagenet_val is not None:
            sets["imagenet_val"] = options.imagenet_val, imagenet(options.imagenet_val)
        if options.imagenet_v2 is not None:
            sets["imagenet_v2"] = options.imagenet_v2, imagenet_v2(options.imagenet_v2)
        if sets:
            measure = self._zero_shot({name: images for name, (_, images) in sets.items()})
            validations.append(
                Validation(
                    "zero_shot",
                    options.zeroshot_frequency,
                    measure,
                    lambda numbers: [{"images": sets[name][0], "zero_shot": numbers[name]} for name in numbers],
                )
            )
        return validations

    @property
    def _common(self) -> dict[str, Any]:
        """Arguments of every measurement."""
        return {"batch_size": self.batch_size, "precision": self.precision, "share": self.share}

    @property
    def _shown(self) -> bool:
        """Whether this rank shows its progress."""
        return self.share.index == 0

    def _retrieval(self, val_data: str) -> Evaluation:
        preprocess, tokenizer = self.built.reader(training=False)
        samples = load_eval_samples(val_data, preprocess, replace(self.reading, dataset_type="auto"), "val_data")
        samples = samples.only(self.share.part(samples.samples, self.batch_size))
        samples.read_at_once, samples.workers = self.batch_size, self.reading.workers

        def measure(model: nn.Module) -> dict[str, Any] | None:
            how = {"by": "group", "multi_positive": self.multi_positive, "show_progress": self._shown, **self._common}
            numbers = evaluate_retrieval(model, samples, tokenizer, **how)
            samples.check_all(self.share.gather)
            return numbers

        return measure

    def _zero_shot(self, sets: dict[str, ClassificationSet]) -> Evaluation:
        preprocess, tokenizer = self.built.reader(training=False)
        classes, templates = next((each.classes, each.templates) for each in sets.values())
        workers, largest = self.reading.workers, self.reading.max_image_pixels

        def measure(model: nn.Module) -> dict[str, Any]:
            classifier = zero_shot_classifier(model, classes, tokenizer, templates, **self._common)
            numbers = {}
            for name, whole in sets.items():
                part: Any = self.share.part(whole.images, self.batch_size)
                images = ClassificationSet(part, classes, templates).samples(
                    preprocess, self.batch_size, workers, largest
                )
                how = {"classifier": classifier, "show_progress": self._shown, **self._common}
                numbers[name] = zero_shot(model, images, classes, tokenizer, **how)
            return numbers

        return measure
