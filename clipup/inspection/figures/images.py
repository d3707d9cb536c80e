"""Figures of images: which expert was chosen for which patch, and what was retrieved for a caption."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from . import svg
from .format import count
from .palette import expert_color, is_second_eight
from .svg import Figure

MOST_CAPTION_CHARACTERS = 200
_MOST_PIXELS = 128
_MOST_PNG_BYTES = 10_000
_CONTEXT = 1  # patches shown around a patch, on each side
_HIT = "#e0660a"
_FRAME = (("#fff", 4), ("#111", 1.6))


def data_uri(image: Image.Image, longest_side: int = _MOST_PIXELS) -> str:
    """The image as a ``data:`` URI, scaled down to ``longest_side`` pixels; the image itself is not changed.

    PNG, which is small for drawings and keeps transparency; JPEG on white where PNG takes over 10 kB.
    """
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((longest_side, longest_side))
    png = io.BytesIO()
    small.save(png, "PNG", optimize=True)
    if len(png.getvalue()) <= _MOST_PNG_BYTES:
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    opaque, jpeg = Image.new("RGB", small.size, "white"), io.BytesIO()
    opaque.paste(small, mask=small if small.mode == "RGBA" else None)
    opaque.save(jpeg, "JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def picture(image: Image.Image, label: str, width: int) -> Figure:
    """The image as an ``<img>`` on white, at most ``width`` CSS pixels wide."""
    tag = svg.element(
        "img",
        src=data_uri(image),
        alt=label,
        width=width,
        height=round(width * image.height / image.width),
        style=f"width:100%;max-width:{width}px;height:auto;background:#fff;border-radius:3px;display:block",
    )
    return Figure(tag)


def routing_map(image: Image.Image, experts: Any, name: str = "first choices", width: int = 144) -> Figure:
    """An image with each patch tinted in the color of its first-choice expert, as SVG.

    experts [grid_h, grid_w] integers from 0 (array, tensor or nested lists; negative: the patch was masked and stays
    untinted). A dot marks experts 8 to 15, which share the colors of 0 to 7.
    """
    grid = np.asarray(experts)
    height = width * image.height / image.width
    cell_h, cell_w = height / grid.shape[0], width / grid.shape[1]
    cells = [
        draw(int(expert), column * cell_w, row * cell_h, cell_w, cell_h)
        for draw in (_cell, _dot)
        for (row, column), expert in np.ndenumerate(grid)
        if expert >= 0
    ]
    return svg.picture(width, round(height, 1), name, *_backdrop(image, width, height), *cells)


def patch(image: Image.Image, grid: tuple[int, int], row: int, column: int, name: str, width: int = 56) -> Figure:
    """One patch of an image, framed, with the patches around it, as SVG; ``grid``: rows and columns of patches."""
    size_w, size_h = image.width / grid[1], image.height / grid[0]
    top, bottom = _around(row, grid[0])
    left, right = _around(column, grid[1])
    crop = image.crop((round(left * size_w), round(top * size_h), round(right * size_w), round(bottom * size_h)))
    cell_w = width / (right - left)
    cell_h = cell_w * size_h / size_w
    height = cell_h * (bottom - top)
    frame = {
        "x": (column - left) * cell_w,
        "y": (row - top) * cell_h,
        "width": cell_w,
        "height": cell_h,
        "fill": "none",
    }
    frames = [svg.element("rect", stroke=color, stroke_width=stroke, **frame) for color, stroke in _FRAME]
    return svg.picture(width, round(height, 1), name, *_backdrop(crop, width, height), *frames)


def expert_mark(expert: int) -> Figure:
    """A square in the expert's color, with its number."""
    size = 24
    place = (1, 1, size - 2, size - 2)
    outline = svg.element("rect", x=1, y=1, width=size - 2, height=size - 2, fill="none", stroke=expert_color(expert))
    parts = [svg.element("rect", width=size, height=size, fill="#fff"), _cell(expert, *place), outline]
    number = svg.element("text", str(expert), x=size / 2, y=16, font_size=11, text_anchor="middle", fill="#111")
    return svg.picture(size, size, f"expert {expert}", *parts, number, style="flex:none")


def expert_legend(experts: int) -> Figure:
    """The colors of all experts with their numbers; the legend of routing maps."""
    parts: list[str] = [expert_mark(expert) for expert in range(experts)]
    if is_second_eight(experts - 1):
        parts.append(svg.element("small", "from 8 on with a dot"))
    return Figure(svg.element("div", *parts, style="display:flex;flex-wrap:wrap;align-items:center;gap:6px"))


def retrieval_row(
    caption: str, target: Image.Image, retrieved: Sequence[Image.Image], rank: int, note: str = "", width: int = 72
) -> Figure:
    """A caption, its image, and the images that a model retrieved for it, best first, as HTML without a style sheet.

    ``rank`` of the caption's image counts from 1; if it is among the retrieved ones, it is framed. ``note``, such as
    the model's name, is put beside the rank.
    """
    beside = f"rank {count(rank)}" + (f" · {svg.clean(note)}" if note else "")
    head = svg.element(
        "figcaption",
        svg.element("span", escape(svg.shorten(caption, MOST_CAPTION_CHARACTERS)), dir="auto"),
        svg.element("small", escape(beside), style="opacity:.75;white-space:nowrap"),
        style="display:flex;justify-content:space-between;gap:12px;overflow-wrap:anywhere;line-height:1.35;text-align:left",
    )
    tiles = [_tile(target, "belongs to the caption", width, "outline:1px dashed currentColor;outline-offset:2px")]
    tiles.append(svg.element("span", "→", style="align-self:center;opacity:.6", aria_hidden="true"))
    tiles += [_tile(image, f"retrieved at rank {place}", width) for place, image in enumerate(retrieved, start=1)]
    if rank <= len(retrieved):
        hit = f"outline:3px solid {_HIT};outline-offset:1px"
        tiles[rank + 1] = _tile(retrieved[rank - 1], f"retrieved at rank {rank}, the correct one", width, hit)
    row = svg.element("div", *tiles, style="display:flex;gap:9px;margin-top:7px")
    return Figure(svg.element("figure", head, row, class_="retrieval", style="margin:0"))


def _tile(image: Image.Image, label: str, width: int, style: str = "") -> str:
    return svg.element(
        "div", picture(image, label, width), style=f"flex:0 1 {width}px;min-width:0;align-self:start;{style}"
    )


def _around(place: int, count: int) -> tuple[int, int]:
    """Start and end of the range shown around ``place`` out of ``count``; as long at an edge as in the middle."""
    size = min(count, 2 * _CONTEXT + 1)
    first = min(max(0, place - _CONTEXT), count - size)
    return first, first + size


def _backdrop(image: Image.Image, width: float, height: float) -> list[str]:
    """The image on white, which shows where it is transparent."""
    return [
        svg.element("rect", width=width, height=height, fill="#fff"),
        svg.element("image", href=data_uri(image), width=width, height=height, preserveAspectRatio="none"),
    ]


def _cell(expert: int, x: float, y: float, width: float, height: float) -> str:
    return svg.element(
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


def _dot(expert: int, x: float, y: float, width: float, height: float) -> str:
    if not is_second_eight(expert):
        return ""
    radius = min(width, height) * 0.16
    look = {"fill": "#fff", "stroke": "#111", "stroke_width": 1, "stroke_opacity": 1}
    return svg.element("circle", cx=x + width / 2, cy=y + height / 2, r=radius, **look)
