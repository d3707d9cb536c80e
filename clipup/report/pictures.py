"""Figures made of pictures: which expert took which patch, and what a retrieval brought back."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from . import svg
from .numbers import count
from .palette import expert_color, is_second_eight

MOST_CAPTION_CHARACTERS = 200
_MOST_PIXELS = 128
_MOST_PNG_BYTES = 10_000
_SMALLEST_CELL_WITH_NUMBER = 13
_HIT = "#e0660a"


def data_uri(image: Image.Image, longest_side: int = _MOST_PIXELS) -> str:
    """The picture as a ``data:`` address, shrunk to ``longest_side`` pixels; the image itself is not changed.

    PNG, which drawings compress well to and which keeps transparency; JPEG on white where PNG takes over 10 kB.
    """
    small = image.convert("RGBA" if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA") else "RGB")
    small.thumbnail((longest_side, longest_side))
    kind, content = "png", _encoded(small, "PNG", optimize=True)
    if len(content) > _MOST_PNG_BYTES:
        kind, content = "jpeg", _encoded(_on_white(small), "JPEG", quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def picture(image: Image.Image, label: str, width: int) -> str:
    """The picture as an ``<img>`` on white, ``width`` CSS pixels wide where there is room."""
    return svg.element(
        "img",
        src=data_uri(image),
        alt=label,
        width=width,
        height=round(width * image.height / image.width),
        style=f"width:100%;max-width:{width}px;height:auto;background:#fff;border-radius:3px;display:block",
    )


def routing_map(image: Image.Image, experts: Any, name: str = "first choices", width: int = 144) -> str:
    """A picture with each patch in the colour of the expert of its first choice, translucent, as SVG.

    experts [grid_h, grid_w] integers from 0 (array, tensor or nested lists; negative: the patch took no part and stays
    uncoloured). Cells that are large enough carry the expert's number; in smaller ones a dot marks experts 8 to 15,
    which share the colours of 0 to 7.
    """
    grid = np.asarray(experts)
    if grid.ndim != 2 or not grid.size or not np.issubdtype(grid.dtype, np.integer):
        raise ValueError(f"experts is {grid.dtype} of shape {grid.shape}; it must be integers [grid_h, grid_w]")
    height = width * image.height / image.width
    cell_h, cell_w = height / grid.shape[0], width / grid.shape[1]
    parts = [
        svg.element("rect", width=width, height=height, fill="#fff"),
        svg.element("image", href=data_uri(image), width=width, height=height, preserveAspectRatio="none"),
    ]
    for (row, col), expert in np.ndenumerate(grid):
        if expert >= 0:
            parts.append(_cell(int(expert), col * cell_w, row * cell_h, cell_w, cell_h))
    return svg.picture(width, round(height, 1), name, *parts)


def expert_legend(experts: int) -> str:
    """The colours of all experts with their numbers, as SVG; the legend of every routing map."""
    a_line, size, parts = 8, 16, []
    for expert in range(experts):
        x, y = 46 * (expert % a_line), 24 * (expert // a_line)
        place = {"x": x + 1, "y": y + 3, "width": size - 2, "height": size - 2}
        parts.append(svg.element("rect", fill="#fff", **place))
        parts.append(_cell(expert, **place, numbered=False))
        parts.append(svg.element("rect", fill="none", stroke=expert_color(expert), stroke_width=2, **place))
        parts.append(svg.text(x + size + 6, y + 15, expert, font_size=13))
    lines = -(-experts // a_line)
    return svg.picture(46 * min(experts, a_line), 24 * lines, f"Colours of experts 0 to {experts - 1}", *parts)


def retrieval_row(
    caption: str, target: Image.Image, retrieved: Sequence[Image.Image], rank: int, note: str = "", width: int = 72
) -> str:
    """A caption, the picture that it belongs to, and the pictures that a model brought back for it, best first.

    ``rank`` counts from 1; the retrieved picture of that rank, when it is among those shown, is framed and marked.
    ``note`` stands beside the rank, the model's name say. HTML that needs no style sheet.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; ranks count from 1, the best")
    beside = f"rank {count(rank)}" + (f" · {svg.clean(note)}" if note else "")
    head = svg.element(
        "figcaption",
        svg.element("span", escape(svg.shorten(caption, MOST_CAPTION_CHARACTERS)), dir="auto"),
        svg.element("small", escape(beside), style="opacity:.75;white-space:nowrap"),
        style="display:flex;justify-content:space-between;gap:12px;overflow-wrap:anywhere;line-height:1.35;text-align:left",
    )
    tiles = [_tile(target, "belongs to the caption", width, "outline:1px dashed currentColor;outline-offset:2px")]
    tiles.append(svg.element("span", "→", style="align-self:center;opacity:.6", aria_hidden="true"))
    for place, image in enumerate(retrieved, start=1):
        right = place == rank
        label = f"retrieved at rank {place}" + (", the right one" if right else "")
        tiles.append(_tile(image, label, width, f"outline:3px solid {_HIT};outline-offset:1px" if right else ""))
    row = svg.element("div", *tiles, style="display:flex;gap:9px;margin-top:7px")
    return svg.element("figure", head, row, class_="retrieval", style="margin:0")


def _tile(image: Image.Image, label: str, width: int, style: str) -> str:
    return svg.element(
        "div", picture(image, label, width), style=f"flex:0 1 {width}px;min-width:0;align-self:start;{style}"
    )


def _cell(expert: int, x: float, y: float, width: float, height: float, numbered: bool = True) -> str:
    rect = svg.element(
        "rect",
        x=x,
        y=y,
        width=width,
        height=height,
        fill=expert_color(expert),
        fill_opacity="0.5",
        stroke="#fff",
        stroke_width=0.5,
    )
    size, middle_x, middle_y = min(width, height), x + width / 2, y + height / 2
    if numbered and size >= _SMALLEST_CELL_WITH_NUMBER:
        font = max(8.5, min(13.0, size * 0.42))
        return rect + svg.text(
            middle_x,
            middle_y + font * 0.36,
            expert,
            font_size=font,
            text_anchor="middle",
            fill="#111",
            stroke="#fff",
            stroke_width=2.4,
            stroke_opacity="0.85",
            style="paint-order:stroke",
        )
    if is_second_eight(expert):
        return rect + svg.element("circle", cx=middle_x, cy=middle_y, r=size * 0.16, fill="#fff", stroke="#111")
    return rect


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")
