"""Image-text retrieval: recall at 1, 5 and 10, both ways, with several captions an image.

Text to image (t2i): the share of captions whose image is among the k best-scored images. Image to text (i2t): the share
of images of which any caption is among the k best-scored captions. Both are what CLIP papers and CLIP_benchmark report.
Equal scores count as if they were ordered by lot, and the expectation is reported: a model that gives everything the
same feature gets chance, not 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .encode import encode_images, encode_texts, progress
from .precision import Precision

RECALL_AT = (1, 5, 10)
_CHUNK = 1024


def retrieval(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> dict[str, Any]:
    """Recall both ways, as fractions of 1.

    Args:
        image_features: [N, D], normalised; every image must have a caption.
        text_features: [M, D], normalised.
        image_of_text: [M] int64, the row of the image that a text describes.

    Returns:
        ``t2i`` and ``i2t``, each {"r1", "r5", "r10"}; ``chance_r1`` (1/N, both ways); ``gallery`` N; ``captions`` M.

    Raises:
        ValueError: no images, shapes that do not fit, an image without caption, features that are not finite.
    """
    _check(image_features, text_features, image_of_text)
    images, captions = len(image_features), len(text_features)
    ranks = ranks_both_ways(image_features, text_features, image_of_text)
    recall = {way: {f"r{k}": hits_at(k, *counts).mean().item() for k in RECALL_AT} for way, counts in ranks.items()}
    return {**recall, "chance_r1": 1 / images, "gallery": images, "captions": captions}


def ranks_both_ways(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For ``t2i`` (a row a text) and ``i2t`` (a row an image): how many candidates score above the best right one, how
    many score as it does, and how many of those are right. int64 each."""
    rows = torch.arange(len(image_features))
    return {
        "t2i": _rank(text_features, image_features, image_of_text, rows),
        "i2t": _rank(image_features, text_features, rows, image_of_text),
    }


def hits_at(k: int, above: Tensor, tied: Tensor, right: Tensor) -> Tensor:
    """The probability that a right candidate is among the k best when ties are ordered by lot; float64, a query each.

    Of ``tied`` places behind the first ``above``, ``right`` hold right candidates and the first k - above are looked
    at: 1 - C(tied - right, seen) / C(tied, seen).
    """
    seen = (k - above).clamp_min(0).minimum(tied)
    miss = torch.ones(len(above), dtype=torch.float64)
    for j in range(int(right.max())):
        factor = (tied - seen - j).clamp_min(0) / (tied - j).clamp_min(1)
        miss = torch.where(j < right, miss * factor, miss)
    return 1 - miss


def evaluate_retrieval(
    model: nn.Module,
    samples: Iterable[tuple[Any, Sequence[str], dict[str, Any]]],
    tokenizer: Callable[[list[str]], Tensor],
    preprocess: Callable[[Any], Tensor] | None = None,
    batch_size: int = 64,
    by: str | None = None,
    precision: Precision = "fp32",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Encodes a data set and measures retrieval on it.

    Args:
        model: open_clip's CLIP, dense or sparse, on its device.
        samples: (image, captions, metadata) triples; ``clipup.data.loaders.eval_samples`` makes them.
        preprocess: image to tensor [3, height, width]; None when the images are tensors already.
        by: a key of the metadata: every value's images are also measured apart, as a gallery of their own.

    Returns:
        What ``retrieval`` returns, and ``splits`` {value: the same} when ``by`` is given and some sample has the key.

    Raises:
        ValueError: an empty data set, or a sample without captions.
    """
    captions: list[str] = []
    image_of_text: list[int] = []
    groups: list[Any] = []

    def images() -> Iterator[Tensor]:
        for row, (image, texts, metadata) in enumerate(progress(samples, "encoding", show_progress)):
            if not texts:
                raise ValueError(f"image {row} of the data set has no caption; every image needs at least one")
            captions.extend(texts)
            image_of_text.extend([row] * len(texts))
            groups.append(None if by is None else metadata.get(by))
            yield image if preprocess is None else preprocess(image)

    image_features = encode_images(model, images(), batch_size, precision)
    text_features = encode_texts(model, captions, tokenizer, batch_size, precision)
    owners = torch.tensor(image_of_text)
    result = retrieval(image_features, text_features, owners)
    values = sorted({group for group in groups if group is not None}, key=str)
    if values:
        result["splits"] = {
            str(value): _of_group(image_features, text_features, owners, [group == value for group in groups])
            for value in values
        }
    return result


def _of_group(image_features: Tensor, text_features: Tensor, image_of_text: Tensor, member: list[bool]) -> dict:
    """Retrieval among the images that are members, and their captions."""
    inside = torch.tensor(member)
    new_row = inside.cumsum(0) - 1
    texts = inside[image_of_text]
    return retrieval(image_features[inside], text_features[texts], new_row[image_of_text[texts]])


def _rank(queries: Tensor, candidates: Tensor, query_key: Tensor, candidate_key: Tensor) -> tuple[Tensor, ...]:
    """A candidate is right for a query when their keys are equal; every query has one that is right."""
    counts = []
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ candidates.T
        right = query_key[start : start + _CHUNK, None] == candidate_key[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ties = scores == best
        counts.append(torch.stack([(scores > best).sum(1), ties.sum(1), (ties & right).sum(1)]))
    above, tied, right_ties = torch.cat(counts, dim=1)
    return above, tied, right_ties


def _check(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> None:
    images, texts = len(image_features), len(text_features)
    if images == 0:
        raise ValueError("image_features is empty: there is no image to retrieve")
    if image_features.dim() != 2 or text_features.dim() != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            "image_features and text_features must be [N, D] and [M, D], got "
            f"{list(image_features.shape)} and {list(text_features.shape)}"
        )
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text must name an image for each of {texts} texts, got {list(image_of_text.shape)}")
    if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise ValueError(f"image_of_text must lie in 0..{images - 1}, got {image_of_text.min()}..{image_of_text.max()}")
    without = torch.bincount(image_of_text, minlength=images) == 0
    if without.any():
        raise ValueError(f"image {int(without.nonzero()[0])} has no caption in image_of_text; every image needs one")
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, so nothing can be ranked: the model is broken")
