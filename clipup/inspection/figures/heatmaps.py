"""One layer's experts as HTML without a style sheet: bars of their load, and a heatmap of their similarity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsFloat

import numpy as np

from .charts import imbalance
from .html import html
from .svg import Figure


def load_bars(
    load: Iterable[SupportsFloat], title: str, subtitle: str = "", longest: float = 0, width: float = 300
) -> Figure:
    """Each expert's share of a layer's routed (token, expert) pairs, one bar per expert; dashed: the uniform share.

    load [E] fractions of 1. ``longest``: the share of the longest bar, which gives several charts one scale; default:
    the layer's own. The largest share over the uniform share is written above the bars, under ``subtitle``.
    """
    shares = [float(share) for share in load]
    longest = max([*shares, 1.25 / len(shares), longest])
    notes = [*([subtitle] if subtitle else []), f"largest share over uniform: {imbalance(shares):.2f}"]
    return html("load_bars", shares=shares, longest=longest, title=title, notes=notes, width=width)


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
    shades = np.clip((values - lightest) / (1 - lightest), 0, 1).tolist()
    notes = [" · ".join(means), f"shades from {lightest:.2f} (light) to 1 (dark)"]
    table = {"rows": values.tolist(), "shades": shades, "others": others}
    return html("similarity_heatmap", **table, title=title, notes=notes, width=width)
