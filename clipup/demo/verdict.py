"""The result of the demonstration in one sentence, with the same wording whether CLIP-UP wins or loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..inspection.figures.format import count, percent, points, short

WAYS = (("text_to_image", "text → image"), ("image_to_text", "image → text"))
_COMPARED = ("clip_up", "dense_continued")
_WRITTEN_ZERO = 0.0005  # a fraction; smaller differences are written 0.0 points
_STANDARD_ERRORS = 2
"""Differences of two rates below this many standard errors are called level."""


class Verdict(NamedTuple):
    """The result, and what is needed to judge it."""

    sentence: str
    notes: tuple[str, ...]


def verdict(report: Mapping[str, Any]) -> Verdict:
    """CLIP-UP minus the dense baseline: R@1 both ways in percentage points, from the content of ``report.json``.

    Differences below two standard errors, given the number of test images, are called level. With one seed, no claim of
    significance is made.
    """
    rates = {(arm, way): report[arm][f"{way}_R@1"] for arm in _COMPARED for way, _ in WAYS}
    test_images = report["data"]["test_images"]
    leads, details = [], []
    for way, name in WAYS:
        clip_up, dense = (rates[arm, way] for arm in _COMPARED)
        leads.append((clip_up - dense, _margin(test_images, [clip_up, dense])))
        details.append(
            f"{points(clip_up - dense)} points of R@1 {name} ({percent(clip_up)} against {percent(dense)}\u00a0%)"
        )
    largest = max(margin for _, margin in leads)
    times = report["clip_up"]["gflops_per_pair"] / report["dense_continued"]["gflops_per_pair"]
    return Verdict(
        f"At equal steps and with one seed CLIP-UP {_standing(leads)}: {' and '.join(details)}.",
        (
            f"No claim of significance is made: with {count(test_images)} test images, differences below "
            f"{100 * largest:.1f} points ({_STANDARD_ERRORS} standard errors) are called level, and the "
            "result also varies with the seed.",
            f"Equal steps are not equal compute: a pair costs CLIP-UP {short(round(times, 2))} times the FLOPs.",
        ),
    )


def _standing(leads: list[tuple[float, float]]) -> str:
    """How CLIP-UP compares, from (lead, margin) both ways; leads below the margin do not count."""
    other = "the dense baseline (continued training)"
    signs = {0 if abs(lead) < margin else int(math.copysign(1, lead)) for lead, margin in leads}
    if signs == {0}:
        written_zero = all(abs(lead) < _WRITTEN_ZERO for lead, _ in leads)
        return f"and {other} are level" + ("" if written_zero else " within the sampling error")
    if signs == {1, -1}:
        return f"is ahead of {other} in one direction and behind it in the other"
    side = "ahead of" if 1 in signs else "behind"
    return f"is {side} {other}" + (" in one direction and level in the other" if 0 in signs else "")


def _margin(test_images: int, rates: Sequence[float]) -> float:
    """The smallest difference of two rates that is not called level."""
    variance = sum(rate * (1 - rate) for rate in rates) / test_images
    return max(_WRITTEN_ZERO, _STANDARD_ERRORS * math.sqrt(variance))
