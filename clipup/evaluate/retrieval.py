"""Image-text retrieval: recall at 1, 5 and 10 in both directions, with several captions per image.

``text_to_image_R@k``: the share of captions whose image is among the k best-scored images. ``image_to_text_R@k``: the
share of images with any caption among the k best-scored captions. The names are those of open_clip_train.
CLIP papers and CLIP_benchmark report the same. Ties count with their expectation under random order, so a model that
gives all inputs the same feature scores at chance level.

Short captions repeat. With ``multi_positive``, equal captions are one text that matches several images; without it,
each caption matches only its own image, as in those papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import Precision
from ..progress import progress
from .encode import encode_images, encode_texts, in_batches
from .shares import Share

WAYS = ("text_to_image", "image_to_text")
RECALL_AT = (1, 5, 10)
_CHUNK = 1024


class NonFiniteFeatures(ValueError, FloatingPointError):
    """Features contain NaN or infinity and cannot be ranked."""


def check_finite(name: str, features: Tensor) -> None:
    """Raises NonFiniteFeatures, naming the features, for NaN and infinity."""
    if not features.isfinite().all():
        raise NonFiniteFeatures(f"{name} contains NaN or infinity, so nothing can be ranked: the model is broken")


def retrieval(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> dict[str, Any]:
    """Recall in both directions, as fractions of 1.

    Args:
        image_features: [N, D], normalised; every image must have a caption.
        text_features: [M, D], normalised.
        image_of_text: [M] int64, the index of the image that each text describes; or [P, 2], pairs (text, image), if a
            text may describe several images.

    Returns:
        ``text_to_image_R@1``, ``text_to_image_R@5``, ``text_to_image_R@10``, the same of ``image_to_text``;
        ``chance_R@1`` (P/(N*M) for P pairs, so 1/N with one image per text); ``gallery`` N; ``captions`` M.

    Raises:
        ValueError: an image or text without a match.
        NonFiniteFeatures: features that are not finite; a subclass of ValueError.
    """
    pairs = _pairs(image_of_text)
    _check(image_features, text_features, pairs)
    images, captions = len(image_features), len(text_features)
    ranks = ranks_both_ways(image_features, text_features, pairs)
    recall = {f"{way}_R@{k}": hits_at(k, *counts).mean().item() for way, counts in ranks.items() for k in RECALL_AT}
    return {**recall, "chance_R@1": len(pairs) / captions / images, "gallery": images, "captions": captions}


def ranks_both_ways(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By ``WAYS``, one row per text and one row per image: the number of candidates above the best match, of candidates
    tied with it, and of matches among the tied candidates. int64 each."""
    pairs = _pairs(image_of_text)
    ranks = _rank(text_features, image_features, pairs), _rank(image_features, text_features, pairs.flip(1))
    return dict(zip(WAYS, ranks, strict=True))


def nll_both_ways(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, logit_scale: float
) -> dict[str, float]:
    """Negative log likelihood in nats, by ``WAYS``: the mean over queries of -log of the probability of the
    matches under the softmax over the gallery. Unlike recall it measures confidence. Arguments as in ``retrieval``;
    logit_scale: the factor of the cosine."""
    pairs = _pairs(image_of_text)

    def mean_nll(queries: Tensor, candidates: Tensor, relation: Tensor) -> float:
        nll = [
            scores.logsumexp(1) - scores.masked_fill(~right, -torch.inf).logsumexp(1)
            for scores, right in _scored(logit_scale * queries, candidates, relation)
        ]
        return torch.cat(nll).double().mean().item()

    means = mean_nll(text_features, image_features, pairs), mean_nll(image_features, text_features, pairs.flip(1))
    return dict(zip(WAYS, means, strict=True))


def hits_at(k: int, above: Tensor, tied: Tensor, right: Tensor) -> Tensor:
    """The probability, per query, that a match is among the k best if ties are ordered at random; float64.

    Of the ``tied`` places after the first ``above``, ``right`` are matches and seen = k - above count:
    1 - C(tied - right, seen) / C(tied, seen).
    """
    seen = (k - above).clamp_min(0).minimum(tied)
    miss = torch.ones(len(above), dtype=torch.float64)
    for j in range(int(right.max())):
        factor = (tied - seen - j).clamp_min(0).double() / (tied - j).clamp_min(1)
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
    multi_positive: bool = False,
    share: Share | None = None,
) -> dict[str, Any] | None:
    """Encodes a data set and measures retrieval on it.

    Args:
        model: open_clip's CLIP, dense or sparse, on its device.
        samples: (image, captions, metadata) triples, as from ``clipup.data.loaders.eval_samples``.
        tokenizer: the model's, texts to token ids [B, context_length].
        preprocess: image to tensor [3, height, width]; None if the images are tensors already.
        batch_size: images, or captions, in a batch.
        by: a metadata key; images with the same value are also measured as a separate gallery.
        precision: fp32, amp (float16 autocast), amp_bf16 (bfloat16 autocast) or bf16 (bfloat16 weights).
        show_progress: a progress bar.
        multi_positive: treats equal captions as one text that matches all their images.
        share: this process's share of a distributed evaluation; ``samples`` are then those of its batches.

    Returns:
        The result of ``retrieval``, and ``splits`` {value: the same} if ``by`` is given and a sample has the key.
        None on all but the first process of a distributed evaluation.

    Raises:
        ValueError: an empty data set, or a sample without captions.
        NonFiniteFeatures: a feature is NaN or infinite.
    """
    share = share or Share()
    about: list[tuple[list[str], Any]] = []

    def images() -> Iterator[Tensor]:
        shown = progress(samples, "encoding", "images", show=show_progress)
        for image, texts, metadata in shown:
            group = None if by is None else metadata.get(by)
            about.append((list(texts), None if group is None else str(group)))
            yield image if preprocess is None else preprocess(image)

    image_features = encode_images(model, images(), batch_size, precision, share)
    about = [texts for batch in share.join(list(in_batches(about, batch_size))) for texts in batch]
    captions = [text for texts, _ in about for text in texts]
    groups = [group for _, group in about]
    pairs = _pairs(torch.tensor([row for row, (texts, _) in enumerate(about) for _ in texts]))
    if multi_positive:
        captions, pairs = merge_equal(captions, pairs)
    text_features = encode_texts(model, captions, tokenizer, batch_size, precision, share)
    if share.index > 0:
        _check(image_features, text_features, pairs)  # what one process refuses, all do
        return None
    result = retrieval(image_features, text_features, pairs)
    values = sorted({group for group in groups if group is not None})
    if values:
        result["splits"] = {
            value: _of_group(image_features, text_features, pairs, [group == value for group in groups])
            for value in values
        }
    return result


def merge_equal(captions: Sequence[str], pairs: Tensor) -> tuple[list[str], Tensor]:
    """The distinct captions in order of first appearance, and the distinct (text, image) pairs between them."""
    row_of = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    rows = torch.tensor([row_of[caption] for caption in captions])
    return list(row_of), torch.stack([rows[pairs[:, 0]], pairs[:, 1]], 1).unique(dim=0)


def _of_group(image_features: Tensor, text_features: Tensor, pairs: Tensor, member: list[bool]) -> dict:
    """Retrieval among the member images and their captions."""
    inside = torch.tensor(member)
    kept = pairs[inside[pairs[:, 1]]]
    texts, text_row = kept[:, 0].unique(return_inverse=True)
    image_row = (inside.cumsum(0) - 1)[kept[:, 1]]
    return retrieval(image_features[inside], text_features[texts], torch.stack([text_row, image_row], 1))


def _pairs(image_of_text: Tensor) -> Tensor:
    """Pairs (text, image) [P, 2] from either form of ``image_of_text``."""
    if image_of_text.dim() != 1:
        return image_of_text
    return torch.stack([torch.arange(len(image_of_text)), image_of_text], 1)


def _rank(queries: Tensor, candidates: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``pairs``: matching (query, candidate); every query has at least one."""
    counts = []
    for scores, right in _scored(queries, candidates, pairs):
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ties = scores == best
        counts.append(torch.stack([(scores > best).sum(1), ties.sum(1), (ties & right).sum(1)]))
    above, tied, right_ties = torch.cat(counts, dim=1)
    return above, tied, right_ties


def _scored(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Per chunk of queries: scores [chunk, candidates], and a mask of the matches."""
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ candidates.T
        first, last = torch.searchsorted(pairs[:, 0].contiguous(), torch.tensor([start, start + len(scores)])).tolist()
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[pairs[first:last, 0] - start, pairs[first:last, 1]] = True
        yield scores, right


def _check(image_features: Tensor, text_features: Tensor, pairs: Tensor) -> None:
    for name, features, column, other in (
        ("image", image_features, pairs[:, 1], "caption"),
        ("text", text_features, pairs[:, 0], "image"),
    ):
        without = torch.bincount(column, minlength=len(features)) == 0
        if without.any():
            raise ValueError(f"{name} {int(without.nonzero()[0])} has no {other} in image_of_text; each needs one")
        check_finite(f"{name}_features", features)
