"""Pages and figures: the demo's report, and what the experts of a model do.

``look`` runs a sparse model over images and captions; its result draws every figure and the whole page. The figures are
also functions by themselves, which take numbers and pictures and return HTML or inline SVG that a notebook shows:

    from clipup.report import Series, line_chart
    line_chart([Series("dense", steps, losses)], "Loss", "step", "contrastive loss")
"""

from __future__ import annotations

from .charts import Series, line_chart, load_chart, smooth
from .demo_page import render_demo
from .experts import ExpertReport, look
from .matrices import load_bars, similarity_heatmap
from .observe import LayerRouting, route_images, route_texts
from .pictures import data_uri, expert_legend, patch, retrieval_row, routing_map
from .svg import Figure
from .tables import comparison_table
from .tokens import token_strip
from .verdict import Verdict, verdict
from .words import Piece, WordShare, expert_words, pieces

__all__ = [
    "ExpertReport",
    "Figure",
    "LayerRouting",
    "Piece",
    "Series",
    "Verdict",
    "WordShare",
    "comparison_table",
    "data_uri",
    "expert_legend",
    "expert_words",
    "line_chart",
    "load_bars",
    "load_chart",
    "look",
    "patch",
    "pieces",
    "render_demo",
    "retrieval_row",
    "route_images",
    "route_texts",
    "routing_map",
    "similarity_heatmap",
    "smooth",
    "token_strip",
    "verdict",
]
