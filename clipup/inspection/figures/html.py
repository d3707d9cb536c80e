"""The figures that are macros of ``figures.html.j2``: HTML and inline SVG."""

from __future__ import annotations

from typing import Any

from ..page import template
from . import svg
from .svg import Figure


def html(macro: str, **values: Any) -> Figure:
    """The figure that a macro draws. Values are escaped unless they are figures."""
    drawn: str = getattr(template("figures.html.j2").module, macro)(**values)
    return Figure(svg.clean(drawn).strip())
