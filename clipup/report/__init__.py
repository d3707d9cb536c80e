"""The demo's report: tables for the terminal, figures as strings, one self-contained HTML page.

The figures are pure functions that return inline SVG or HTML and can be used by themselves, from a notebook say:

    from IPython.display import HTML
    from clipup.report import Series, line_chart
    HTML(line_chart([Series("dense", steps, losses)], "Loss", "step", "contrastive loss"))
"""

from __future__ import annotations

from .charts import Series, line_chart, load_chart, smooth
from .demo_page import render_demo
from .pictures import data_uri, expert_legend, retrieval_row, routing_map
from .tables import comparison_table
from .verdict import Verdict, verdict

__all__ = [
    "Series",
    "Verdict",
    "comparison_table",
    "data_uri",
    "expert_legend",
    "line_chart",
    "load_chart",
    "render_demo",
    "retrieval_row",
    "routing_map",
    "smooth",
    "verdict",
]
