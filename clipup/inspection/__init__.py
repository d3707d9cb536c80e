"""Inspecting the experts of a model, with figures for notebooks and pages.

``inspect_experts`` runs a sparse model over images and captions; its result draws every figure and the whole page. The
figures are also plain functions of numbers and images that return HTML or inline SVG, which notebooks display:

    from clipup.inspection import Series, line_chart
    line_chart([Series("dense", steps, losses)], "Loss", "step", "contrastive loss")
"""

from __future__ import annotations

from .expert_report import ExpertReport, inspect_experts
from .figures.charts import Series, line_chart, load_chart, smooth
from .figures.heatmaps import load_bars, similarity_heatmap
from .figures.images import data_uri, expert_legend, patch, retrieval_row, routing_map
from .figures.svg import Figure
from .figures.token_strip import token_strip
from .routing_trace import LayerRouting, route_images, route_texts
from .token_words import Piece, WordShare, expert_words, pieces

__all__ = [
    "ExpertReport",
    "Figure",
    "LayerRouting",
    "Piece",
    "Series",
    "WordShare",
    "data_uri",
    "expert_legend",
    "expert_words",
    "line_chart",
    "load_bars",
    "load_chart",
    "inspect_experts",
    "patch",
    "pieces",
    "retrieval_row",
    "route_images",
    "route_texts",
    "routing_map",
    "similarity_heatmap",
    "smooth",
    "token_strip",
]
