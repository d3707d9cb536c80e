"""One layer's experts as SVG: bars of their load, and a heatmap of their pairwise similarity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, SupportsFloat

import numpy as np

from . import svg
from .axes import FONT, text_width
from .charts import imbalance
from .format import percent
from .palette import expert_color, is_second_eight
from .svg import Figure

_ROW, _BAR = 19, 11
_LIGHT, _DARK = (0xF1, 0xF5, 0xFA), (0x17, 0x4A, 0x8B)
_WHITE_INK_ABOVE = 0.73  # where white and black text have the same contrast with the shade, 4.5 to 1
_SMALLEST_CELL_WITH_VALUE = 27


def load_bars(load: Iterable[SupportsFloat], title: str, subtitle: str = "", width: float = 300) -> Figure:
    """Each expert's share of a layer's routed (token, expert) pairs, one bar per expert; dashed: the uniform share.

    load [E] fractions of 1. The largest share over the uniform one is written above the bars, under ``subtitle``.
    """
    shares = [float(share) for share in load]
    if not shares:
        raise ValueError("load is empty; it must hold one share per expert")
    uniform, known = 1 / len(shares), [share for share in shares if math.isfinite(share)]
    notes = [*([subtitle] if subtitle else []), f"largest share over uniform: {imbalance(shares):.2f}"]
    left, right, top = 26.0, width - 62.0, 26.0 + 17 * len(notes)
    scale = (right - left) / max([*known, 1.25 * uniform])
    bottom = top + _ROW * len(shares)
    parts = [svg.text(0.0, 15.0, svg.shorten(title, int(width / 8)), font_size=14, font_weight=600)]
    for line, note in enumerate(notes):
        parts.append(svg.text(0.0, 33.0 + 17 * line, note, font_size=FONT - 0.5, fill_opacity=0.75))
    for expert, share in enumerate(shares):
        y, length = top + _ROW * expert + (_ROW - _BAR) / 2, scale * share if math.isfinite(share) else 0.0
        baseline = y + _BAR / 2 + 4
        parts.append(svg.text(left - 8, baseline, expert, font_size=FONT, text_anchor="end"))
        parts.append(svg.element("rect", x=left, y=y, width=length, height=_BAR, fill=expert_color(expert)))
        if is_second_eight(expert) and length > 8:
            parts.append(svg.element("circle", cx=left + 5, cy=y + _BAR / 2, r=2.2, fill="#fff", stroke="#111"))
        label = "unused" if share == 0 else f"{percent(share)}%"
        parts.append(svg.text(width - 2, baseline, label, font_size=FONT - 1, text_anchor="end", fill_opacity=0.85))
    at = left + scale * uniform
    parts.append(svg.line(at, top - 3, at, bottom + 3, stroke_dasharray="4 3", stroke_opacity=0.75))
    return svg.picture(width, bottom + 8, f"{title}: load of each expert", *parts)


def similarity_heatmap(
    cosines: Any, title: str, to_dense: Any = None, granularity: int = 1, width: float = 300
) -> Figure:
    """Cosines between all pairs of experts as a heatmap, from 0 (light) to 1 (dark).

    cosines [E, E]; to_dense [E] adds a column for the dense MLP. Large cells show their value, and every cell has it as
    a tooltip. Under the title is the mean over all pairs of experts that were initialized equal: those whose indices
    have the same remainder modulo ``granularity``, the number of shards of an MLP.
    """
    values = np.asarray(cosines, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"cosines has shape {values.shape}; it must be [E, E]")
    experts = len(values)
    if to_dense is not None:
        dense = np.asarray(to_dense, dtype=float)
        if dense.shape != (experts,):
            raise ValueError(f"to_dense has shape {dense.shape}; it must be [{experts}], one cosine per expert")
    left, top, gap = 26.0, 62.0, 10.0
    room = width - left - (gap if to_dense is not None else 0)
    cell = min(38.0, room / (experts + (to_dense is not None)))
    parts = [
        svg.text(0.0, 15.0, svg.shorten(title, int(width / 8)), font_size=14, font_weight=600),
        svg.text(0.0, 33.0, _means(values, to_dense, granularity), font_size=FONT - 0.5, fill_opacity=0.75),
    ]
    for row in range(experts):
        y = top + cell * row
        parts.append(svg.text(left - 7, y + cell / 2 + 4, row, font_size=FONT, text_anchor="end"))
        parts.append(svg.text(left + cell * (row + 0.5), top - 6, row, font_size=FONT, text_anchor="middle"))
        parts += [_shade(left + cell * c, y, cell, values[row, c], f"{row} and {c}") for c in range(experts)]
        if to_dense is not None:
            parts.append(_shade(left + cell * experts + gap, y, cell, dense[row], f"{row} and the dense MLP"))
    if to_dense is not None:
        label_x = left + cell * (experts + 0.5) + gap
        label_x = min(label_x, width - text_width("dense") / 2)
        parts.append(svg.text(label_x, top - 6, "dense", font_size=FONT - 1, text_anchor="middle"))
    height = top + cell * experts + 2
    return svg.picture(width, height, f"{title}: cosine between each pair of experts", *parts)


def _means(values: np.ndarray, to_dense: Any, granularity: int) -> str:
    shard = np.arange(len(values)) % granularity
    between = values[np.triu(shard[:, None] == shard, 1)]
    pairs = "all pairs" if granularity == 1 else "pairs of the same shard"
    words = [f"mean of {pairs}: {between.mean():.3f}"] if between.size else ["no two experts were initialized equal"]
    if to_dense is not None:
        words.append(f"to dense: {np.mean(np.asarray(to_dense, dtype=float)):.3f}")
    return " · ".join(words)


def _shade(x: float, y: float, size: float, value: float, pair: str) -> str:
    if not math.isfinite(value):
        return ""
    part = min(1.0, max(0.0, value))
    color = [round(light + part * (dark - light)) for light, dark in zip(_LIGHT, _DARK, strict=True)]
    fill = "#" + "".join(f"{channel:02x}" for channel in color)
    place = {"x": x + 0.5, "y": y + 0.5, "width": size - 1, "height": size - 1}
    cell = svg.element("rect", svg.title(f"{pair}: {value:.3f}"), fill=fill, **place)
    if size < _SMALLEST_CELL_WITH_VALUE:
        return cell
    written = f"{value:.2f}".replace("0.", ".", 1)
    ink = "#fff" if part > _WHITE_INK_ABOVE else "#000"
    middle, baseline = x + size / 2, y + size / 2 + 3.8
    return cell + svg.text(middle, baseline, written, font_size=FONT - 1.5, text_anchor="middle", fill=ink)
