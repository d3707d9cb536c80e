"""Formatting of numbers in tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def count(value: float) -> str:
    """A whole number with thousands separators: 38,412."""
    return f"{value:,.0f}"


def percent(fraction: float, decimals: int = 1) -> str:
    """A fraction of 1 in percent, without the sign: 0.2345 is 23.5 (with one decimal)."""
    return f"{100 * fraction:.{decimals}f}"


def chance(fraction: float) -> str:
    """Chance level in percent, with two significant digits: 0.001 is 0.10."""
    return percent(fraction, _decimals(100 * fraction, 2))


def points(difference: float) -> str:
    """A difference of two fractions of 1 in percentage points, always with its sign: +1.2, −0.4, 0.0."""
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def column(values: Sequence[float], significant: int = 3) -> list[str]:
    """A column of numbers with equal decimals, so that the smallest non-zero number has ``significant`` digits."""
    decimals = _decimals(min(abs(value) for value in values if value), significant)
    return [f"{value:,.{decimals}f}" for value in values]


def short(value: float) -> str:
    """A tick label, as short as possible: 0, 0.25, 1,500."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value else "0"


def percent_tick(fraction: float) -> str:
    """A tick label of a fraction of 1, in percent: 12.5%."""
    return short(round(100 * fraction, 6)) + "%"


def _decimals(value: float, significant: int) -> int:
    return min(6, max(0, significant - 1 - math.floor(math.log10(abs(value)))))
