"""The result of the demonstration in one sentence, with the same wording whether CLIP-UP wins or loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..inspection.figures.format import count, percent, points, short

WAYS = (("text_to_image", "text → image"), ("image_to_text", "image → text"))
_COMPARED = ("clip_up", "dense_continued")
_LEAST_MARGIN = 0.0005  # a fraction; smaller differences are written 0.0 points
_STANDARD_ERRORS = 2
"""Differences of two rates below this many standard errors are called level."""
_OTHER = "continued dense training"
_STANDING = {
    (0,): f"and {_OTHER} are level within sampling error",
    (1,): f"is ahead of {_OTHER}",
    (-1,): f"is behind {_OTHER}",
    (0, 1): f"is ahead of {_OTHER} in one direction and level in the other",
    (-1, 0): f"is behind {_OTHER} in one direction and level in the other",
    (-1, 1): f"is ahead of {_OTHER} in one direction and behind it in the other",
}
"""How CLIP-UP compares, by the signs of its leads in both directions; those below the margin are 0."""


class Verdict(NamedTuple):
    """The result, and what is needed to judge it."""

    sentence: str
    notes: tuple[str, ...]


def verdict(report: Mapping[str, Any]) -> Verdict:
    """CLIP-UP minus the dense baseline: R@1 both ways in percentage points, from the content of ``report.json``.

    Differences below two standard errors, given the number of test images, are called level. With one seed, no claim of
    significance is made.
    """
    test_images = report["data"]["test_images"]
    signs, margins, details = set(), [], []
    for way, name in WAYS:
        clip_up, dense = (report[arm][f"{way}_R@1"] for arm in _COMPARED)
        variance = (clip_up * (1 - clip_up) + dense * (1 - dense)) / test_images
        margins.append(max(_LEAST_MARGIN, _STANDARD_ERRORS * math.sqrt(variance)))
        signs.add(0 if abs(clip_up - dense) < margins[-1] else int(math.copysign(1, clip_up - dense)))
        details.append(
            f"R@1 {name} {percent(clip_up)} against {percent(dense)}\u00a0% ({points(clip_up - dense)} points)"
        )
    times = report["clip_up"]["gflops_per_pair"] / report["dense_continued"]["gflops_per_pair"]
    return Verdict(
        f"CLIP-UP {_STANDING[tuple(sorted(signs))]} (equal steps, one seed): {', '.join(details)}.",
        (
            f"No claim of significance is made: with {count(test_images)} test images, differences below "
            f"{100 * max(margins):.1f} points ({_STANDARD_ERRORS} standard errors) are called level, and the "
            "result also varies with the seed.",
            f"Equal steps are not equal compute: a pair costs CLIP-UP {short(round(times, 2))} times the FLOPs.",
        ),
    )
