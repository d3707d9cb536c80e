"""Draws expert_mlp.svg: how tokens become rows, rows become outputs, and how the CPU engine cuts the work.

    python docs/figures/expert_mlp.py

The routing that is drawn is that of `dispatch`: all first choices before any second one, inside a choice by position.
"""

from __future__ import annotations

from pathlib import Path

from clipup.inspection.figures import svg

COLORS = ("#2266aa", "#ff9911", "#bb2266")  # the report's first three experts
CHOICES = ((0, 1), (1, 2), (0, 2), (1, 0), (0, 1), (2, 0), (0, 2), (1, 0))
"""Experts of every token, the first choice first."""

TOP, HEIGHT, TOKEN, ROW = 92, 160, 20, 10
COLUMNS = {"x": 14, "rows": 150, "hidden": 288, "out": 540, "y": 640}
"""Left edges; every column is 52 wide, that of the hidden activations 168."""
INK, SMALL = "currentColor", 14  # the smallest text, 8 px where 700 px are shown as 400


def rows_in_expert_order() -> list[tuple[int, int]]:
    """(token, expert) of every row."""
    slots = [(expert, k, t) for t, experts in enumerate(CHOICES) for k, expert in enumerate(experts)]
    return [(token, expert) for expert, _, token in sorted(slots)]


def text(
    x: float, y: float, words: str, size: int = SMALL, anchor: str = "middle", fill: str = INK, weight: int = 400
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def lines(x: float, y: float, words: tuple[str, ...], **style: str | int) -> str:
    return "".join(text(x, y + 18 * i, line, anchor="start", **style) for i, line in enumerate(words))


def box(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {extra}/>'


def arrow(x: float, y: float, length: float) -> str:
    return f'<path d="M{x:g} {y:g}h{length - 6:g}m-1 -4l7 4l-7 4z" stroke="{INK}" fill="{INK}"/>'


def pipeline() -> list[str]:
    """Gather, product, activation, product, combine, on eight tokens, three experts and two choices per token."""
    drawn = []
    for t, experts in enumerate(CHOICES):
        y = TOP + TOKEN * t
        drawn.append(box(COLUMNS["x"], y, 52, TOKEN - 2, "#d8dee4"))
        drawn.append(box(COLUMNS["y"], y, 52, TOKEN - 2, "#d8dee4"))
        drawn.append(text(COLUMNS["x"] + 15, y + 14, f"t{t}", fill="#1c2128"))
        drawn.append(text(COLUMNS["y"] + 36, y + 14, f"t{t}", fill="#1c2128"))
        for k, expert in enumerate(experts):
            drawn.append(box(COLUMNS["x"] + 32 + 9 * k, y + 4, 7, 10, COLORS[expert]))
    for row, (token, expert) in enumerate(rows_in_expert_order()):
        y, color = TOP + ROW * row, COLORS[expert]
        for name, width in (("rows", 52), ("hidden", 168), ("out", 52)):
            drawn.append(box(COLUMNS[name], y, width, ROW - 1, color))
        line = f'stroke="{color}" stroke-width="1.2" fill="none"'
        middle, of_token = y + ROW / 2, TOP + TOKEN * (token + 0.45)
        for start, start_y, end, end_y in (
            (COLUMNS["x"] + 52, of_token, COLUMNS["rows"], middle),
            (COLUMNS["out"] + 52, middle, COLUMNS["y"], of_token),
        ):
            drawn.append(
                f'<path d="M{start} {start_y:g}C{start + 44} {start_y:g} {end - 44} {end_y:g} {end} {end_y:g}" {line}/>'
            )
    for x, words in ((108, "gather"), (245, "GEMM 1"), (372, "bias, activation"), (498, "GEMM 2"), (616, "combine")):
        drawn.append(text(x, TOP - 40, words, weight=600))
    for x, words in ((245, "W_in of each expert"), (498, "W_out of each"), (625, "sum of gate × row")):
        drawn.append(text(x, TOP - 20, words))
    drawn += [arrow(206, TOP + HEIGHT / 2, 78), arrow(460, TOP + HEIGHT / 2, 76)]
    names = {"x": "x [T, D]", "rows": "rows [R, D]", "out": "rows [R, D]", "y": "y [T, D]"}
    drawn += [text(COLUMNS[name] + 26, TOP + HEIGHT + 20, words) for name, words in names.items()]
    drawn.append(text(COLUMNS["hidden"] + 84, TOP + HEIGHT + 20, "z and a = act(z) [R, H]"))
    wave = f'stroke="{INK}" stroke-width="1.6" stroke-dasharray="5 3" rx="4"'
    drawn.append(box(COLUMNS["rows"] - 6, TOP - 5, 450, 7 * ROW + 8, "none", wave))
    drawn.append(box(COLUMNS["hidden"] + 54, TOP + 21, 60, 28, COLORS[0]))
    drawn.append(text(COLUMNS["hidden"] + 84, TOP + 40, "a wave", fill="#ffffff", weight=600))
    return drawn


def engine(top: float) -> list[str]:
    """One wave's first product, cut into blocks, a block into tiles, a tile into registers."""
    drawn = [text(14, top - 46, "On a CPU: what one wave's GEMM 1 is cut into", size=15, anchor="start", weight=600)]
    faint = f'stroke="{INK}" stroke-opacity="0.4"'
    grids = (("blocks", 66, 60), ("tiles", 33, 10), ("registers", 66, 8.5))
    for name, width, height in grids:
        inside = f'<path d="M{width} 0H0V{height}" fill="none" stroke="#ffffff" stroke-width="1.4"/>'
        size = f'width="{width}" height="{height}" patternUnits="userSpaceOnUse"'
        drawn.append(f'<pattern id="{name}" {size} patternTransform="translate(0 {top:g})">{inside}</pattern>')
    places = {"blocks": (14, 198), "tiles": (270, 132), "registers": (470, 132)}
    for name, (x, width) in places.items():
        drawn.append(box(x, top, width, 119, COLORS[0]))
        drawn.append(f'<g transform="translate({x} 0)">{box(0, top, width, 119, f"url(#{name})")}</g>')
    drawn.append(box(146, top, 66, 60, "none", f'stroke="{COLORS[1]}" stroke-width="3"'))
    drawn.append(box(303, top + 30, 33, 10, "none", f'stroke="{COLORS[1]}" stroke-width="3"'))
    for start, first, last, end in ((212, top, top + 60, 270), (336, top + 30, top + 40, 470)):
        drawn.append(f'<path d="M{start} {first:g}L{end} {top:g}M{start} {last:g}L{end} {top + 119:g}" {faint}/>')
    drawn += [
        text(14, top - 12, "the wave's rows × H", anchor="start"),
        text(270, top - 12, "a block", anchor="start"),
        text(470, top - 12, "a tile of sums", anchor="start"),
        lines(
            14, top + 142, ("blocks of up to 504 rows and", "128 columns; a thread takes", "the next when it is done")
        ),
        lines(270, top + 142, ("tiles of 14 rows and", "32 columns, weights", "packed in passing")),
        lines(
            470, top + 142, ("28 registers of 16 sums", "(AVX-512); bias, activation,", "then GEMM 2's packed operand")
        ),
    ]
    return drawn


def figure() -> str:
    width, height, title = 700, 552, "expert_mlp: gather, GEMM, activation, GEMM, combine; and waves, blocks and tiles"
    drawn = [
        svg.INK,
        text(14, 28, "Eight tokens, three experts, two choices per token", size=15, anchor="start", weight=600),
        *pipeline(),
        *engine(360),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    )
    return "\n".join([head, f"<title>{title}</title>", *drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(figure(), encoding="utf-8")
