"""Measurements of a study: retrieval on splits with repeated captions, and similarity of the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipup.evaluate.encode import encode_images, encode_texts
from clipup.evaluate.retrieval import hits_at, merge_equal, nll_both_ways, ranks_both_ways
from clipup.inspection.expert_similarity import model_similarity

BATCH = 256
_SCALES = [2 ** (quarter / 4) for quarter in range(8, 29)]  # of logits: 4 to 128


def retrieval_numbers(
    model: nn.Module,
    samples: Sequence[tuple[Tensor, Sequence[str], dict[str, Any]]],
    tokenizer: Callable[[list[str]], Tensor],
    best_temperature: bool = False,
) -> dict[str, Any]:
    """Retrieval in which all images of a caption count as correct.

    Args:
        samples: (image, captions, metadata) triples, from ``clipup.data.loaders.eval_samples``.
        best_temperature: adds ``best_nll`` of both ways at the logit scale whose mean of both is least, so that models
            are compared by what they know and not by how sure they are.

    Returns:
        For each of the ``WAYS``, such as ``text_to_image``: ``text_to_image_R@1``, ``text_to_image_R@5``,
        ``text_to_image_nll``; ``gallery`` and ``captions``, their numbers.
    """
    captions = [caption for _, texts, _ in samples for caption in texts]
    owners = [row for row, (_, texts, _) in enumerate(samples) for _ in texts]
    pairs = torch.stack([torch.arange(len(captions)), torch.tensor(owners)], 1)
    distinct, pairs = merge_equal(captions, pairs)
    images = encode_images(model, (image for image, _, _ in samples), BATCH)
    texts = encode_texts(model, distinct, tokenizer, BATCH)
    nll = nll_both_ways(images, texts, pairs, model.logit_scale.exp().item())
    numbers: dict[str, Any] = {"gallery": len(images), "captions": len(texts)}
    for way, ranks in ranks_both_ways(images, texts, pairs).items():
        numbers |= {f"{way}_R@{k}": hits_at(k, *ranks).mean().item() for k in (1, 5)} | {f"{way}_nll": nll[way]}
    if best_temperature:
        of_scale = (nll_both_ways(images, texts, pairs, scale) for scale in _SCALES)
        best = min(of_scale, key=lambda of_way: sum(of_way.values()))
        numbers |= {f"{way}_best_nll": value for way, value in best.items()}
    return numbers


def expert_cosines(model: nn.Module) -> dict[str, float]:
    """Mean cosine between the experts' first matrices by sparse layer; of fine-grained experts, between those that were
    initialized as the same shard."""
    return {name: similarity.first_mean for name, similarity in model_similarity(model).items()}
