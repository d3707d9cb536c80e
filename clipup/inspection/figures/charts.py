"""Charts as inline SVG, drawn by matplotlib: lines over steps, and the load of each expert over steps.

Text, grid and axes take the page's font and text color, so a chart is legible on light and dark pages. The same data
give the same bytes. A value that is not finite leaves a gap.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from ...extras import needed_for
from . import svg
from .format import percent_tick, short
from .palette import ARMS, expert_color, is_second_eight
from .svg import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#010203"  # becomes the page's text color
_SOFT, _RULE = _INK + "b0", _INK + "22"
_BAND = ARMS["clip_up"]
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipup",  # ids depend on content alone
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "text.color": _INK,
    "font.size": 12,
    "axes.edgecolor": _INK + "80",
    "axes.labelcolor": _SOFT,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titlecolor": _SOFT,
    "axes.titlepad": 12,
    "axes.xmargin": 0.005,
    "axes.formatter.useoffset": False,
    "axes.ymargin": 0.06,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "xtick.color": _INK + "80",
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.columnspacing": 1.4,
    "legend.labelcolor": _INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "lines.scale_dashes": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.06,
}
_POINTS = 72  # in an inch: a chart's pixels are matplotlib's points
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_CHARACTER = 6.5  # px, average of a wide sans serif at 12 px: the reader's font cannot be measured
_MOST_POINTS = 100


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, of equal length. ``points`` marks every point. ``dash``: lengths of a dash and of a
    gap in pixels, "6 3". ``errors``: halves of vertical intervals around ``y``. ``notes``: a text at each point, below
    it on the right, or ``above`` it on the left."""

    label: str
    x: Sequence[SupportsFloat]
    y: Sequence[SupportsFloat]
    color: str | None = None
    dash: str | None = None
    points: bool = False
    errors: Sequence[float] = ()
    notes: Sequence[str] = ()
    above: bool = False


def smooth(values: Sequence[SupportsFloat], window: int) -> list[float]:
    """Centered moving mean over ``window`` values (fewer at the ends); values that are not finite are ignored."""
    floats, left, right = np.array(values, dtype=float), (window - 1) // 2, window // 2
    return [_mean(floats[max(0, index - left) : index + right + 1]) for index in range(len(floats))]


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
    log_ticks: Sequence[float] = (),
    width: float = 440,
    height: float = 290,
) -> Figure:
    """Lines over a shared x axis, as SVG.

    ``percent``: fractions of 1 are written as percentages. ``y_range``: ends of the y axis; by default those of the
    values. ``levels``: (y, label) of dashed horizontal lines. ``log_ticks``: ticks of a logarithmic x axis. Series
    without a color cycle through the palette, dashed from the second cycle on; points have four shapes.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def paint(axes: Axes) -> None:
        for row, line in enumerate(series):
            dash = "5 3" if line.color is None and is_second_eight(row) else None
            color = expert_color(row) if line.color is None else line.color
            look: dict[str, Any] = {"color": color, "linestyle": _dashes(line.dash or dash), "clip_on": False}
            x, y = np.array(line.x, dtype=float), np.array(line.y, dtype=float)
            axes.plot(x, y, marker="osD^"[row % 4] if line.points else "", label=line.label, **look)
            if line.errors:
                axes.errorbar(x, y, line.errors, fmt="none", ecolor=color, elinewidth=1.2, capsize=4)
            place: Any = {"xytext": (-6, 5), "ha": "right"} if line.above else {"xytext": (6, -13)}
            for note, right, up in zip(line.notes, x, y, strict=False):
                axes.annotate(note, (right, up), textcoords="offset points", **place)
                axes.margins(x=0.13)  # room for the notes of the outer points
        for level, label in levels:
            axes.axhline(level, color=_SOFT, linewidth=1, linestyle=_dashes("4 4"))
            right = axes.get_yaxis_transform()
            axes.annotate(label, (1, level), (-2, 4), right, "offset points", color=_SOFT, ha="right")
        axes.set_ylim(y_range)
        if log_ticks:
            axes.set_xscale("log")
            axes.set_xticks(log_ticks, [short(tick) for tick in log_ticks])
            axes.minorticks_off()

    labels = [line.label for line in series] if len(series) > 1 else []
    return _drawn(paint, title, x_label, y_label, labels, percent, width, height)


def load_chart(
    steps: Sequence[SupportsFloat],
    loads: Sequence[Sequence[SupportsFloat]],
    title: str,
    *,
    y_max: float | None = None,
    width: float = 440,
    height: float = 290,
) -> Figure:
    """The band of the experts' shares of all routed (token, expert) pairs over training, as SVG.

    It extends from the share of the least used expert to that of the busiest expert; the dashed line is the uniform
    share 1/E. More than 100 steps are drawn as 100 means of adjacent steps.

    Args:
        steps: [N].
        loads: [N, E], fractions of 1.
        y_max: the largest share of several charts, which gives them the same axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shares = np.array(loads, dtype=float)
    experts = shares.shape[1]
    groups = np.array_split(np.arange(len(shares)), min(len(shares), _MOST_POINTS))
    x = [fmean(float(steps[int(i)]) for i in group) for group in groups]
    x[0], x[-1] = float(steps[0]), float(steps[-1])
    means = np.stack([shares[group].mean(0) for group in groups])
    high, low = means.max(1), means.min(1)
    imbalances = [imbalance(row) for row in shares]
    labels = ["least to most used expert", f"uniform, 1/{experts}"]

    def paint(axes: Axes) -> None:
        axes.fill_between(x, low, high, facecolor=_BAND + "50", edgecolor=_BAND, linewidth=1.2, label=labels[0])
        axes.axhline(1 / experts, color=_INK, linewidth=1, linestyle=_dashes("4 4"), label=labels[1])
        axes.set_ylim(0, y_max or max(*high.tolist(), 1.5 / experts))

    note = f"largest share over uniform: {imbalances[-1]:.2f} at the end, {max(imbalances):.2f} at most"
    return _drawn(paint, title, "step", "share of choices", labels, True, width, height, note)


def imbalance(load: Iterable[SupportsFloat]) -> float:
    """Largest share over the uniform share: 1 if the load is balanced."""
    shares = [float(share) for share in load]
    return max(shares) * len(shares)


def _drawn(
    paint: Callable[[Axes], None],
    title: str,
    x_label: str,
    y_label: str,
    labels: Sequence[str],
    percent: bool,
    width: float,
    height: float,
    note: str = "",
) -> Figure:
    """The SVG of the axes that ``paint`` draws on, under a title, a legend of the lines with ``labels``, and a note.

    The y axis ends at a tick, so that the highest value lies below the top line of the grid.
    """
    with needed_for("drawing charts", "demo"):
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    with matplotlib.rc_context(_STYLE):
        canvas, written = Canvas((width / _POINTS, height / _POINTS)), io.StringIO()
        axes = canvas.subplots()
        axes.set(xlabel=x_label, ylabel=y_label, title=note)
        axes.locator_params(nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: percent_tick(value))
        paint(axes)
        axes.set_ylim(top=max(axes.yaxis.get_major_locator().tick_values(*axes.get_ylim())))
        lines = axes.get_legend_handles_labels()[0] if labels else []
        columns = max(1, int(width / max(len(label) * _CHARACTER + 40 for label in ["", *labels])))
        head = {"title": svg.clean(title), "title_fontproperties": {"weight": "bold", "size": 14}, "ncols": columns}
        canvas.legend(lines, labels, loc="outside upper left", alignment="left", **head)
        canvas.savefig(written, format="svg", transparent=True, metadata=_NO_METADATA)
    drawn = written.getvalue().replace(_INK, "currentColor")
    start, end = drawn.index("</defs>") + len("</defs>"), drawn.rindex("</svg>")  # without rules for the whole page
    drawn = re.sub(r'(?<=<g) id="[^"]*"| font-family: [^;]*;', "", drawn[start:end])
    return svg.picture(width, height, title, " ".join(drawn.split()), **{"xmlns:xlink": "http://www.w3.org/1999/xlink"})


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _dashes(lengths: str | None) -> Any:
    return (0, tuple(map(float, lengths.split()))) if lengths else "solid"
