"""The images that fit a text or another image best, and a page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..data.images import load_image, upright
from ..inspection.figures import svg
from ..inspection.figures.images import data_uri
from ..inspection.page import template
from .image_index import ImageIndex

_THUMBNAIL = 360
"""Largest side of a picture on the page, in pixels."""


class Result(NamedTuple):
    """An image that was found."""

    path: Path
    score: float
    """Cosine of its features and those of the query."""


def find(index: ImageIndex, queries: Tensor, count: int, min_score: float = -1.0) -> list[list[Result]]:
    """For every query, the ``count`` images with the largest cosines of at least ``min_score``, best first. The search
    is exact.

    Args:
        queries: [Q, D] float32, of length 1: features of texts or images.
    """
    scores, rows = (queries.float() @ index.features.T).topk(min(count, len(index.entries)))
    return [
        [
            Result(index.images / index.entries[row].name, score)
            for row, score in zip(*of_query, strict=True)
            if score >= min_score
        ]
        for of_query in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def results_page(index: ImageIndex, found: Sequence[tuple[str, Sequence[Result]]], command: str) -> str:
    """One HTML page with the results of each query, small pictures included, which link to the files; to be written as
    UTF-8. Pictures that equal one above them are counted with it.

    Args:
        found: every query, a text or the name of an image, with its images of ``index``.
        command: the command line that searches again.
    """
    page = template("results.html.j2", __package__).render(
        index=index,
        found=[(query, _folded(index, results)) for query, results in found],
        command=command,
        picture=_picture,
    )
    return svg.clean(page)


def _folded(index: ImageIndex, results: Sequence[Result]) -> list[tuple[Result, int]]:
    """The results without those whose picture equals an earlier one, each with the number of these. Pictures with
    a cosine over 0.9999 are equal: copies, or nearly so."""
    rows = {index.images / entry.name: row for row, entry in enumerate(index.entries)}
    features = index.features[[rows[result.path] for result in results]]
    equal = zip(results, (features @ features.T > 0.9999).tolist(), strict=True)
    return [(result, sum(row[at + 1 :])) for at, (result, row) in enumerate(equal) if not any(row[:at])]


def _picture(path: Path) -> str | None:
    """The picture as a data URL; None if it is not there any more."""
    try:
        picture = upright(load_image(str(path)))
    except Exception:  # PIL has no common class for what a broken file may raise
        return None
    return data_uri(picture, _THUMBNAIL)
