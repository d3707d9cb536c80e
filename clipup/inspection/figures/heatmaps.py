"""One layer's experts as HTML without a style sheet: bars of their load, and a heatmap of their similarity."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any, SupportsFloat

import numpy as np

from . import svg
from .charts import imbalance
from .format import percent
from .palette import expert_color
from .svg import Figure

_LIGHT, _DARK = "#f1f5fa", "#174a8b"
_WHITE_INK_ABOVE = 0.73  # where white and black text have the same contrast with the shade, 4.5 to 1
_MOST_WITH_VALUES = 8  # experts; the cells of more are too small for their values


def load_bars(
    load: Iterable[SupportsFloat], title: str, subtitle: str = "", longest: float = 0, width: float = 300
) -> Figure:
    """Each expert's share of a layer's routed (token, expert) pairs, one bar per expert; dashed: the uniform share.

    load [E] fractions of 1. ``longest``: the share of the longest bar, which gives several charts one scale; default:
    the layer's own. The largest share over the uniform one is written above the bars, under ``subtitle``.
    """
    shares = [float(share) for share in load]
    longest = max([*shares, 1.25 / len(shares), longest])
    dashes = (
        f"position:absolute;left:{100 / len(shares) / longest:.1f}%;top:0;bottom:0;border-left:1px dashed;opacity:.75"
    )
    uniform = svg.element("span", "", style=dashes)
    cells = []
    for expert, share in enumerate(shares):
        bar = f"display:block;width:{100 * share / longest:.1f}%;height:11px;background:{expert_color(expert)}"
        cells += [
            svg.element("span", str(expert), style="text-align:right"),
            svg.element("span", svg.element("span", "", style=bar), uniform, style="position:relative;padding:4px 0"),
            svg.element("small", f"{percent(share)}%" if share else "unused", style="text-align:right;opacity:.85"),
        ]
    notes = [*([subtitle] if subtitle else []), f"largest share over uniform: {imbalance(shares):.2f}"]
    columns = "grid-template-columns:auto 1fr 48px;column-gap:8px"
    grid = f"display:grid;{columns};align-items:center;font-size:12px;margin-top:6px"
    return _titled(title, notes, svg.element("div", *cells, style=grid), width)


def similarity_heatmap(
    cosines: Any, title: str, to_dense: Any = None, granularity: int = 1, lightest: float = 0, width: float = 300
) -> Figure:
    """Cosines between all pairs of experts as a heatmap, from ``lightest`` (below 1) and less to 1, the darkest.

    cosines [E, E]; to_dense [E] adds a column for the dense MLP. Large cells show their value, and every cell has it as
    a tooltip. Under the title is the mean over all pairs of experts that were initialized equal: those whose indices
    have the same remainder modulo ``granularity``, the number of shards of an MLP.
    """
    values = np.asarray(cosines, dtype=float)
    experts, shard = len(values), np.arange(len(values)) % granularity
    between = values[np.triu(shard[:, None] == shard, 1)]
    pairs = "all pairs" if granularity == 1 else "pairs of the same shard"
    means = [f"mean of {pairs}: {between.mean():.3f}" if between.size else "no two experts were initialized equal"]
    others = [str(expert) for expert in range(experts)]
    if to_dense is not None:
        dense = np.asarray(to_dense, dtype=float)
        means.append(f"to dense: {dense.mean():.3f}")
        values, others = np.column_stack([values, dense]), [*others, "dense"]
    cells = [svg.element("span", name, style="align-self:end;text-align:center") for name in ("", *others)]
    for row, cosines_of_row in enumerate(values):
        cells.append(svg.element("span", str(row), style="text-align:right;padding-right:6px"))
        cells += [
            _shade(value, (value - lightest) / (1 - lightest), f"{row} and {other}", experts)
            for value, other in zip(cosines_of_row, others, strict=True)
        ]
    columns = f"26px repeat({len(others)},minmax(0,38px))"
    grid = f"display:grid;grid-template-columns:{columns};gap:1px;align-items:center;font-size:12px;margin-top:4px"
    return _titled(
        title,
        [" · ".join(means), f"shades from {lightest:.2f} (light) to 1 (dark)"],
        svg.element("div", *cells, style=grid),
        width,
    )


def _shade(value: float, part: float, pair: str, experts: int) -> str:
    part = min(1.0, max(0.0, part))
    ink = "#fff" if part > _WHITE_INK_ABOVE else "#000"
    look = f"background:color-mix(in srgb,{_DARK} {100 * part:.1f}%,{_LIGHT});color:{ink}"
    box = "aspect-ratio:1;display:grid;place-items:center;font-size:10.5px"
    written = f"{value:.2f}".replace("0.", ".", 1) if experts <= _MOST_WITH_VALUES else ""
    return svg.element("span", written, title=f"{pair}: {value:.3f}", style=f"{look};{box}")


def _titled(title: str, notes: Iterable[str], content: str, width: float) -> Figure:
    head = svg.element("strong", escape(svg.clean(title)), style="font-size:14px;font-weight:600")
    small = [
        svg.element("small", escape(svg.clean(note)), style="display:block;font-size:11.5px;opacity:.75")
        for note in notes
    ]
    return Figure(
        svg.element("div", head, *small, content, style=f"max-width:{width:g}px;text-align:left;line-height:1.45")
    )
