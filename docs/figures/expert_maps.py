"""Which expert a demonstration's model chooses for each patch of five drawings, as one SVG.

clipup demo
python docs/figures/expert_maps.py runs/demo
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

import clipup
from clipup.inspection import data_uri, inspect_experts, routing_map
from clipup.inspection.figures import svg
from clipup.inspection.figures.html import html

SIDE, GAP, LINE = 100, 10, 20  # px, whose texts are legible on a phone
HEIGHT = LINE + SIDE + GAP
SCALE = 8  # coordinates are those of 32 x 32 pixels, the size that the model sees


def ray(turn: float) -> list[float]:
    """A triangle that points away from the center."""
    corners = ((15, turn), (8, turn + 0.4), (8, turn - 0.4))
    return [value for radius, a in corners for value in (16 + radius * math.cos(a), 16 + radius * math.sin(a))]


DRAWINGS: dict[str, list[tuple[str, list[float], str]]] = {
    "house": [
        ("rectangle", [7, 15, 25, 28], "#d9480f"),
        ("polygon", [3, 16, 16, 4, 29, 16], "#862e9c"),
        ("rectangle", [13, 20, 18, 28], "#fff3bf"),
    ],
    "sailboat": [
        ("polygon", [15, 3, 15, 20, 5, 20], "#228be6"),
        ("polygon", [17, 6, 17, 20, 27, 20], "#74c0fc"),
        ("polygon", [3, 22, 29, 22, 24, 28, 8, 28], "#a0522d"),
    ],
    "sun": [
        *(("polygon", ray(turn * math.pi / 4), "#f59f00") for turn in range(8)),
        ("ellipse", [9, 9, 23, 23], "#fcc419"),
    ],
    "tree": [
        ("rectangle", [14, 22, 18, 30], "#8d5524"),
        ("polygon", [16, 2, 25, 13, 7, 13], "#37b24d"),
        ("polygon", [16, 8, 28, 24, 4, 24], "#2b8a3e"),
    ],
    "fish": [
        ("polygon", [19, 16, 30, 8, 30, 24], "#1971c2"),
        ("ellipse", [2, 8, 24, 24], "#4dabf7"),
        ("ellipse", [6, 12, 9, 15], "#1c2128"),
    ],
}


def draw(shapes: list[tuple[str, list[float], str]]) -> Image.Image:
    """The shapes on nothing, which the model's transform makes white, the first at the bottom."""
    image = Image.new("RGBA", (32 * SCALE, 32 * SCALE))
    pen = ImageDraw.Draw(image)
    for shape, points, color in shapes:
        getattr(pen, shape)([SCALE * value for value in points], fill=color)
    return image


def figure(demo: Path) -> str:
    """SVG: a row of drawings, a row of maps for each sparse layer of the image tower, the experts' colors, and the
    model's time and recall.

    ``demo``: the directory of a demonstration.
    """
    sparse, _, preprocess = clipup.create_model_and_transforms(str(demo / "clip_up" / "model"))
    drawings = [draw(shapes) for shapes in DRAWINGS.values()]
    seen = inspect_experts(sparse, drawings, preprocess=preprocess)
    rows: list[tuple[str, Sequence[str]]] = [
        ("Drawing", [svg.element("image", href=data_uri(drawing), width=SIDE, height=SIDE) for drawing in drawings])
    ]
    for name, layer in seen.of_tower("image").items():
        maps = [routing_map(*pair, width=SIDE) for pair in zip(drawings, layer.maps(), strict=True)]
        rows.append((f"{seen.title(name)}: the first choice for each patch", maps))
    parts = [_row(label, cells, number * HEIGHT) for number, (label, cells) in enumerate(rows)]
    report, top = json.loads((demo / "report.json").read_text("utf-8")), len(rows) * HEIGHT
    experts = max(layer.num_experts for layer in seen.layers.values())
    marks = [html("expert_mark", expert=expert) for expert in range(experts)]
    moved = [svg.element("g", mark, transform=f"translate({70 + 30 * n} 0)") for n, mark in enumerate(marks)]
    parts.append(svg.element("g", _text("Expert", 0), *moved, transform=f"translate(0 {top:g})"))
    parts += [_text(line, top + (number + 1.75) * LINE) for number, line in enumerate(result(report))]
    return f"{svg.for_file(''.join(parts), len(drawings) * (SIDE + GAP) - GAP, top + 3.75 * LINE)}\n"


def result(report: dict) -> tuple[str, str]:
    """The sparse model's time and recall in two lines."""
    sparse, dense, way = report["clip_up"], report["dense_continued"], "text_to_image_R@1"
    cores = "1 CPU core" if report["machine"]["threads"] == 1 else f"{report['machine']['threads']} CPU cores"
    return (
        f"Trained for {sparse['steps']} steps in {sparse['seconds']:.0f} s on {cores}. The right picture of "
        f"{report['data']['test_images']:,}",
        f"comes first for {100 * sparse[way]:.0f} % of captions (dense model: {100 * dense[way]:.0f} %, "
        f"chance: {100 * report['chance_R@1']:.1f} %).",
    )


def _row(label: str, cells: Sequence[str], top: int) -> str:
    """Cells side by side under a label."""
    moved = [svg.element("g", cell, transform=f"translate({n * (SIDE + GAP)} {LINE})") for n, cell in enumerate(cells)]
    return svg.element("g", _text(label, 0), *moved, transform=f"translate(0 {top})")


def _text(line: str, top: int) -> str:
    return svg.element("text", line, y=top + 15, font_size=13, fill="currentColor")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(__file__).with_suffix(".svg").write_text(figure(Path(sys.argv[1])), encoding="utf-8")
