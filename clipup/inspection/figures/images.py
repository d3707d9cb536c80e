"""Figures of images: which expert was chosen for which patch, and what was retrieved for a caption."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from . import svg
from .html import html
from .svg import Figure

MOST_CAPTION_CHARACTERS = 200
_MOST_PIXELS = 128
_MOST_PNG_BYTES = 10_000
_CONTEXT = 1  # patches shown around a patch, on each side


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
    height = round(width * image.height / image.width)
    return html("picture", uri=data_uri(image), label=label, width=width, height=height)


def map_width(columns: int) -> int:
    """Width of a routing map in which the numbers of experts are legible, in CSS pixels."""
    return max(144, 12 * columns)


def routing_map(image: Image.Image, experts: Any, name: str = "first choices", width: int | None = None) -> Figure:
    """An image in gray, each patch tinted in the color of its first-choice expert, with the expert's number, as SVG.

    experts [grid_h, grid_w] integers from 0 (array, tensor or nested lists; negative: the patch was masked and stays
    untinted). Eight experts have colors of their own; the others share them. ``width`` in CSS pixels, by default
    ``map_width``; patches that are smaller than 11 pixels have no number.
    """
    grid, gray = np.asarray(experts), image.convert("LA" if image.has_transparency_data else "L")
    width = width or map_width(grid.shape[1])
    height = width * image.height / image.width
    return html("routing_map", uri=data_uri(gray), experts=grid.tolist(), name=name, width=width, height=height)


def patch(image: Image.Image, grid: tuple[int, int], row: int, column: int, name: str, width: int = 56) -> Figure:
    """One patch of an image, framed, with the patches around it, as SVG; ``grid``: rows and columns of patches."""
    size_w, size_h = image.width / grid[1], image.height / grid[0]
    top, bottom = _around(row, grid[0])
    left, right = _around(column, grid[1])
    crop = image.crop((round(left * size_w), round(top * size_h), round(right * size_w), round(bottom * size_h)))
    cell_width = width / (right - left)
    return html(
        "patch",
        uri=data_uri(crop),
        rows=bottom - top,
        columns=right - left,
        row=row - top,
        column=column - left,
        cell_width=cell_width,
        cell_height=cell_width * size_h / size_w,
        name=name,
    )


def expert_legend(experts: int) -> Figure:
    """The colors of all experts with their numbers; the legend of routing maps."""
    return html("expert_legend", experts=experts)


def retrieval_row(
    caption: str, target: Image.Image, retrieved: Sequence[Image.Image], rank: int, note: str = "", width: int = 72
) -> Figure:
    """A caption, its image, and the images that a model retrieved for it, best first, as HTML without a style sheet.

    ``rank`` of the caption's image counts from 1; if it is among the retrieved images, it is framed. ``note``, such as
    the model's name, is put beside the rank.
    """
    shown = [
        picture(image, f"retrieved at rank {place}{', the correct one' * (place == rank)}", width)
        for place, image in enumerate(retrieved, start=1)
    ]
    return html(
        "retrieval_row",
        caption=svg.shorten(caption, MOST_CAPTION_CHARACTERS),
        target=picture(target, "belongs to the caption", width),
        retrieved=shown,
        rank=rank,
        note=note,
        width=width,
    )


def _around(place: int, count: int) -> tuple[int, int]:
    """Start and end of the range shown around ``place`` out of ``count``; as long at an edge as in the middle."""
    size = min(count, 2 * _CONTEXT + 1)
    first = min(max(0, place - _CONTEXT), count - size)
    return first, first + size
