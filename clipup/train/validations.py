"""What a run measures on data of its own: retrieval on ``val_data``, zero-shot accuracy on ImageNet.

All ranks share each of them, through the code of ``clipup eval``.
"""

from __future__ import annotations

from collections.abc import Callable
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
from .setup import Built, both

RETRIEVAL, ZERO_SHOT = "retrieval", "zero_shot"
_READERS = {"imagenet_val": imagenet, "imagenet_v2": imagenet_v2}
"""The options that name data to classify, and what reads them."""


class Validation(NamedTuple):
    """A measurement that is repeated."""

    name: str
    every: int
    """Epochs between two of them; 0 measures at the end of the run only."""
    measure: Callable[[nn.Module], dict[str, Any] | None]
    """A function of the model (not wrapped) that all ranks call; rank 0 gets the numbers."""


def build_validations(options: TrainOptions, built: Built, precision: Precision, ranks: Ranks) -> list[Validation]:
    """Those that the options ask for; their data are found now, and read when they are measured."""
    share = Share(ranks.rank, ranks.world_size, ranks.gather, in_step=options.is_sharded)
    found = []
    if options.val_data is not None:
        measure = _retrieval(options, built, precision, ranks, share)
        found.append(Validation(RETRIEVAL, options.val_frequency, measure))
    if any(getattr(options, name) is not None for name in _READERS):
        measure = _zero_shot(options, built, precision, ranks, share)
        found.append(Validation(ZERO_SHOT, options.zeroshot_frequency, measure))
    return found


def _retrieval(
    options: TrainOptions, built: Built, precision: Precision, ranks: Ranks, share: Share
) -> Callable[[nn.Module], dict[str, Any] | None]:
    assert options.val_data is not None
    preprocess, tokenizer = both(built.preprocess_val, built.tokenizer)
    samples = load_eval_samples(options.val_data, preprocess, options.val_data_options(), "val_data")
    samples = samples.only(share.part(samples.samples, options.batch_size))

    def measure(model: nn.Module) -> dict[str, Any] | None:
        return evaluate_retrieval(
            model,
            samples,
            tokenizer,
            batch_size=options.batch_size,
            by="group",
            precision=precision,
            multi_positive=options.multi_positive,
            show_progress=ranks.first,
            share=share,
        )

    return measure


def _zero_shot(
    options: TrainOptions, built: Built, precision: Precision, ranks: Ranks, share: Share
) -> Callable[[nn.Module], dict[str, Any] | None]:
    preprocess, tokenizer = both(built.preprocess_val, built.tokenizer)
    sets = {}
    for name, reader in _READERS.items():
        path = getattr(options, name)
        if path is not None:
            sets[name] = reader(path)
    common: dict[str, Any] = {"batch_size": options.batch_size, "precision": precision, "share": share}

    def measure(model: nn.Module) -> dict[str, Any] | None:
        first = next(iter(sets.values()))
        classifier = zero_shot_classifier(model, first.classes, tokenizer, first.templates, **common)
        numbers = {}
        for name, whole in sets.items():
            part: Any = share.part(whole.images, options.batch_size)
            mine = ClassificationSet(part, whole.classes, whole.templates)
            images = mine.samples(preprocess, options.batch_size, options.workers, options.max_image_pixels)
            numbers[name] = zero_shot(
                *(model, images, whole.classes, tokenizer),
                show_progress=ranks.first,
                classifier=classifier,
                **common,
            )
        return numbers

    return measure
