"""The result of the demonstration in one sentence, with the same wording whether CLIP-UP wins or loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..inspection.figures.format import count, dig, number, percent, points, short

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
    significance is made. If the report lacks numbers, the sentence says so.
    """
    found = {(arm, way): number(dig(report, arm, f"{way}_R@1")) for arm in _COMPARED for way, _ in WAYS}
    rates = {key: rate for key, rate in found.items() if rate is not None}
    if len(rates) < len(found):
        missing = [f"{way}_R@1 of {arm}" for (arm, way), rate in found.items() if rate is None]
        return Verdict(f"No verdict: {', '.join(missing)} is not in the report.", ())
    differences = {way: rates["clip_up", way] - rates["dense_continued", way] for way, _ in WAYS}
    details = " and ".join(
        f"{points(differences[way])} points of R@1 {name} "
        f"({percent(rates['clip_up', way])} against {percent(rates['dense_continued', way])}\u00a0%)"
        for way, name in WAYS
    )
    margins = {way: _margin(report, [rates[arm, way] for arm in _COMPARED]) for way, _ in WAYS}
    standing = _standing([(differences[way], margins[way]) for way, _ in WAYS])
    sentence = f"{_steps(report)} and with one seed CLIP-UP {standing}: {details}."
    return Verdict(sentence, (*_sampling(report, margins), *_compute(report)))


def _steps(report: Mapping[str, Any]) -> str:
    clip_up, dense = (number(dig(report, arm, "steps")) for arm in _COMPARED)
    if clip_up == dense:
        return "At equal steps"
    return f"At unequal steps ({count(clip_up)} against {count(dense)})"


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


def _margin(report: Mapping[str, Any], rates: list[float]) -> float:
    """The smallest difference of two rates that is not called level."""
    images = number(dig(report, "data", "test_images"))
    if not images or images < 1:
        return _WRITTEN_ZERO
    rates = [min(1.0, max(0.0, rate)) for rate in rates]
    return max(_WRITTEN_ZERO, _STANDARD_ERRORS * math.sqrt(sum(rate * (1 - rate) for rate in rates) / images))


def _sampling(report: Mapping[str, Any], margins: Mapping[str, float]) -> tuple[str, ...]:
    images = number(dig(report, "data", "test_images"))
    if not images or images < 1:
        return ()
    return (
        f"No claim of significance is made: with {count(images)} test images, differences below "
        f"{100 * max(margins.values()):.1f} points ({_STANDARD_ERRORS} standard errors) are called level, and the "
        "result also varies with the seed.",
    )


def _compute(report: Mapping[str, Any]) -> tuple[str, ...]:
    sparse, dense = (number(dig(report, arm, "gflops_per_pair")) for arm in _COMPARED)
    if not sparse or not dense:
        return ()
    times = short(round(sparse / dense, 2))
    return (f"Equal steps are not equal compute: a pair costs CLIP-UP {times} times the FLOPs.",)
