"""Reads icons and their names from the npm package @iconify/json, which has one JSON file per icon set.

    DIR/package.json         {"version": ...}
    DIR/json/<set>.json      {"icons": {name: {"body": SVG, ...}}, "width", "height", "info": {"name", "license", ...}}

DIR is what `npm pack @iconify/json` unpacks to, or node_modules/@iconify/json.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipup.extras import needed_for
from clipup.progress import progress as shown

PACKAGE = "@iconify/json"
_DEFAULT_SIDE = 16  # the format's own
_QUARTER_TURNS = 4
_EMBEDS_IMAGE = re.compile(r"<\s*(?:[\w.-]+:)?(?:image|feImage)\b")
_LINK_TO_FILE = re.compile(r"""href\s*=\s*["'](?!#|data:)""")
_FRAME = ("left", "top", "width", "height", "rotate", "hFlip", "vFlip")


@dataclass(frozen=True)
class IconSet:
    """The maker of a set, its licence (an SPDX identifier), and the licence's URL."""

    set: str
    gives: str
    """Its name."""
    made_by: str
    licence: str
    url: str


@dataclass(frozen=True)
class Icon:
    """One drawing: its set's prefix, its name ("account-arrow-left") and a whole SVG document."""

    set: str
    name: str
    svg: str

    @property
    def key(self) -> str:
        return f"{self.set}/{self.name}"


def version(package: Path) -> str:
    """
    Raises:
        FileNotFoundError: ``package`` is not the unpacked npm package.
    """
    if not (package / "json").is_dir():
        raise FileNotFoundError(
            f"package: {package} holds no unpacked {PACKAGE} (package.json and json/): get it with "
            f"`npm pack {PACKAGE}` and `tar -xzf iconify-json-*.tgz`, and name the directory `package`"
        )
    return str(_read(package / "package.json")["version"])


def renderer_version() -> str:
    """
    Raises:
        ImportError: resvg-py is not installed.
    """
    with needed_for("drawing icons", "demo"):
        return importlib.metadata.version("resvg-py")


def read_set(package: Path, prefix: str) -> tuple[IconSet, list[Icon]]:
    """A set and its icons by name, without hidden ones (withdrawn by their makers) and aliases."""
    content = _read(package / "json" / f"{prefix}.json")
    info, licence = content["info"], content["info"]["license"]
    described = IconSet(
        prefix,
        info["name"],
        info["author"]["name"],
        licence.get("spdx") or licence["title"],
        licence.get("url") or info["author"].get("url", ""),
    )
    frame = {name: content[name] for name in _FRAME if name in content}
    icons = [(name, icon) for name, icon in sorted(content["icons"].items()) if not icon.get("hidden")]
    return described, [Icon(prefix, name, _document({**frame, **icon})) for name, icon in icons]


def read_sets(package: Path, prefixes: Sequence[str], progress: bool = False) -> tuple[list[IconSet], list[Icon]]:
    """Several sets, and all their icons in the order of the prefixes."""
    read = [read_set(package, prefix) for prefix in shown(prefixes, "reading icon sets", "sets", show=progress)]
    return [described for described, _ in read], [icon for _, icons in read for icon in icons]


def render(svg: str, size: int) -> Image.Image:
    """Renders an icon: RGB, black or in its own colors on white, `size` x `size` pixels, centered if it is not square.

    Raises ValueError: it is unreadable, or embeds an image from a file.
    """
    with needed_for("drawing icons", "demo"):
        import resvg_py

    if _EMBEDS_IMAGE.search(svg) and _LINK_TO_FILE.search(svg):
        raise ValueError("it embeds an image from a file")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def _document(icon: dict) -> str:
    """An icon's body as an SVG document, per Iconify's format: in its own frame, flipped, then rotated, drawn in black.

    The outer frame is square, so that a renderer keeps the proportions.
    """
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", _DEFAULT_SIDE), icon.get("height", _DEFAULT_SIDE)
    x, y = left + width / 2, top + height / 2
    turns = icon.get("rotate", 0) % _QUARTER_TURNS
    flips = [-1 if icon.get(flip) else 1 for flip in ("hFlip", "vFlip")]
    moves = [f"rotate({90 * turns} {x:g} {y:g})"] if turns else []
    if -1 in flips:
        moves.append(f"translate({x:g} {y:g}) scale({flips[0]} {flips[1]}) translate({-x:g} {-y:g})")
    body = f'<g transform="{" ".join(moves)}">{icon["body"]}</g>' if moves else icon["body"]
    side = max(width, height)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{x - side / 2:g} {y - side / 2:g} {side:g} {side:g}">{body}</svg>'
    )


def _read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))
