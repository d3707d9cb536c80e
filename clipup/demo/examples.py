"""Examples for the demonstration's page: routing of patches, and retrievals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..evaluate.encode import encode_images, encode_texts
from ..inspection import route_images

Sample = tuple[Tensor, Sequence[str], dict[str, Any]]


def routing_examples(
    model: nn.Module, samples: list[Sample], pictures: list[Image.Image], count: int = 8
) -> list[dict]:
    """The first-choice expert of each patch, by sparse layer of the image tower, for ``count`` images of both groups.

    Returns:
        [{"image", "caption", "layers": {layer: integers [grid height, grid width]}}]
    """
    chosen = _alternating(samples, count)
    routings = route_images(model, [samples[i][0] for i in chosen])
    maps = {layer: routing.maps() for layer, routing in routings.items()}
    return [
        {"image": pictures[i], "caption": samples[i][1][0], "layers": {layer: maps[layer][row] for layer in maps}}
        for row, i in enumerate(chosen)
    ]


def retrieval_examples(
    model: nn.Module,
    samples: list[Sample],
    pictures: list[Image.Image],
    tokenizer: Callable[[list[str]], Tensor],
    count: int = 4,
) -> dict[str, list[dict]]:
    """The captions that retrieve their image with the largest margin, and those with the smallest.

    Returns:
        {"best", "worst"}: ``count`` each of {"caption", "target", "rank" (from 1), "retrieved" (5 images)}
    """
    images = encode_images(model, [image for image, _, _ in samples], batch_size=256)
    captions = [texts[0] for _, texts, _ in samples]
    scores = encode_texts(model, captions, tokenizer, batch_size=256) @ images.T
    own = scores.diagonal()
    others = scores.masked_fill(torch.eye(len(samples), dtype=torch.bool), -math.inf)
    margin = own - others.max(1).values
    rank = 1 + (scores > own[:, None]).sum(1)

    def examples(order: Tensor) -> list[dict]:
        picked = _alternating([samples[i] for i in order.tolist()], count)
        rows = [int(order[i]) for i in picked]
        return [
            {
                "caption": captions[i],
                "target": pictures[i],
                "rank": int(rank[i]),
                "retrieved": [pictures[j] for j in scores[i].topk(5).indices.tolist()],
            }
            for i in rows
        ]

    return {
        "best": examples(margin.argsort(descending=True, stable=True)),
        "worst": examples(margin.argsort(stable=True)),
    }


def _alternating(samples: Sequence[Sample], count: int) -> list[int]:
    """Indices of the first ``count`` samples, taken from the groups in turn."""
    groups: dict[str, list[int]] = {}
    for index, (_, _, metadata) in enumerate(samples):
        groups.setdefault(metadata["group"], []).append(index)
    turns = max(map(len, groups.values()))
    return [members[turn] for turn in range(turns) for members in groups.values() if turn < len(members)][:count]
