"""Formatting of numbers in tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def dig(tree: Any, *path: str) -> Any:
    """The value at a path of keys in nested mappings; None if a key is missing."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return None
    return as_float if math.isfinite(as_float) else None


def count(value: Any) -> str:
    """A whole number with thousands separators: 38,412."""
    found = number(value)
    return MISSING if found is None else f"{found:,.0f}"


def percent(fraction: Any, decimals: int = 1) -> str:
    """A fraction of 1 in percent, without the sign: 0.2345 is 23.5 (with one decimal)."""
    found = number(fraction)
    return MISSING if found is None else f"{100 * found:.{decimals}f}"


def chance(fraction: Any) -> str:
    """Chance level in percent, with two significant digits: 0.001 is 0.10."""
    found = number(fraction)
    return percent(fraction, _decimals(100 * found, 2) if found else 1)


def points(difference: float | None) -> str:
    """A difference of two fractions of 1 in percentage points, always with its sign: +1.2, −0.4, 0.0."""
    if difference is None:
        return MISSING
    rounded = round(100 * difference, 1)
    sign = "+" if rounded > 0 else "−" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.1f}"


def ratio(value: float | None, base: float | None) -> str:
    """The value over the base: ×1.32."""
    return MISSING if value is None or not base else f"×{value / base:.2f}"


def column(values: Sequence[float | None], significant: int = 3) -> list[str]:
    """A column of numbers with equal decimals, so that the smallest non-zero one has ``significant`` digits."""
    sizes = [abs(value) for value in values if value]
    decimals = _decimals(min(sizes), significant) if sizes else 0
    return [MISSING if value is None else f"{value:,.{decimals}f}" for value in values]


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
