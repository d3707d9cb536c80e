"""The charts of a demonstration's report as one SVG on white: loss, retrieval, and the load of one layer's experts.

make demo
python docs/figures/demo_charts.py runs/demo/report.html
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHARTS = ("Contrastive loss, continued training", "R@1 text → image", "R@1 image → text", "Image tower, block 1")
COLUMNS, GAP = 2, 24  # px


def figure(report: str) -> str:
    """SVG of the charts of ``report`` (HTML) whose titles begin with ``CHARTS``, in two columns."""
    charts = [_chart(report, title) for title in CHARTS]
    width, height = (float(re.search(rf'\b{side}="([\d.]+)"', charts[0])[1]) for side in ("width", "height"))
    placed = [
        chart.replace(
            "<svg ", f'<svg x="{GAP + i % COLUMNS * (width + GAP):g}" y="{GAP + i // COLUMNS * (height + GAP):g}" ', 1
        )
        for i, chart in enumerate(charts)
    ]
    rows = -(-len(charts) // COLUMNS)
    size = f'{COLUMNS * (width + GAP) + GAP:g}" height="{rows * (height + GAP) + GAP:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size} color="#1c2128" font-family="sans-serif">'
        f'<title>Charts of a demonstration\'s report</title><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(placed)}</svg>\n"
    )


def _chart(report: str, title: str) -> str:
    found = re.search(rf"<svg [^>]*><title>{re.escape(title)}.*?</svg>", report, re.DOTALL)
    if found is None:
        raise SystemExit(f"demo_charts: the report has no chart {title!r}; make one with `make demo`")
    return found[0]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(__file__).with_suffix(".svg").write_text(figure(Path(sys.argv[1]).read_text("utf-8")), encoding="utf-8")
