"""The answer of the demonstration in a sentence, built the same way whichever way it falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .numbers import count, dig, number, percent, points, short

WAYS = (("t2i", "text → image"), ("i2t", "image → text"))
_COMPARED = ("clip_up", "dense_continued")
_LEVEL = 0.0005  # a fraction; smaller differences are written 0.0 points


class Verdict(NamedTuple):
    """What the comparison says, and what has to be known to judge it."""

    sentence: str
    notes: tuple[str, ...]


def verdict(report: Mapping[str, Any]) -> Verdict:
    """CLIP-UP minus the dense model continued, R@1 both ways in percentage points, from what ``report.json`` holds.

    No claim of significance is made: it is one seed. A report without the numbers gets a sentence that says so.
    """
    arms = {arm: {way: number(dig(report, arm, way, "r1")) for way, _ in WAYS} for arm in _COMPARED}
    missing = [f"{arm} {way}" for arm, found in arms.items() for way, value in found.items() if value is None]
    if missing:
        return Verdict(f"No verdict: R@1 of {', '.join(missing)} is not in the report.", ())
    differences = {way: arms["clip_up"][way] - arms["dense_continued"][way] for way, _ in WAYS}
    details = " and ".join(
        f"{points(differences[way])} points of R@1 {name} "
        f"({percent(arms['clip_up'][way])} against {percent(arms['dense_continued'][way])}\u00a0%)"
        for way, name in WAYS
    )
    sentence = f"{_steps(report)} and with one seed CLIP-UP {_standing(list(differences.values()))}: {details}."
    return Verdict(sentence, (*_sampling(report, arms), *_compute(report)))


def _steps(report: Mapping[str, Any]) -> str:
    clip_up, dense = (number(dig(report, arm, "steps")) for arm in _COMPARED)
    if clip_up == dense:
        return "At equal steps"
    return f"At unequal steps ({count(clip_up)} against {count(dense)})"


def _standing(differences: list[float]) -> str:
    """How CLIP-UP stands, from its lead in both directions."""
    other = "the dense model continued"
    signs = {0 if abs(lead) < _LEVEL else int(math.copysign(1, lead)) for lead in differences}
    if signs == {0}:
        return f"and {other} are level"
    if signs == {1, -1}:
        return f"is ahead of {other} in one direction and behind it in the other"
    side = "ahead of" if 1 in signs else "behind"
    return f"is {side} {other}" + (" in one direction and level in the other" if 0 in signs else "")


def _sampling(report: Mapping[str, Any], arms: Mapping[str, Mapping[str, float | None]]) -> tuple[str, ...]:
    images = number(dig(report, "data", "test_images"))
    if not images or images < 1:
        return ()
    rates = [min(1.0, max(0.0, rate)) for found in arms.values() for rate in found.values() if rate is not None]
    error = max(math.sqrt(rate * (1 - rate) / images) for rate in rates)
    return (
        f"No claim of significance is made: {count(images)} test images alone leave each R@1 a standard "
        f"error of up to {100 * error:.1f} points, and another seed would move it as well.",
    )


def _compute(report: Mapping[str, Any]) -> tuple[str, ...]:
    sparse, dense = (number(dig(report, arm, "gflops_per_pair")) for arm in _COMPARED)
    if not sparse or not dense:
        return ()
    times = short(round(sparse / dense, 2))
    return (f"Equal steps are not equal compute: a pair costs CLIP-UP {times} times the FLOPs.",)
