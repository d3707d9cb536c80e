"""SVG and HTML elements as strings, with attributes and text escaped."""

from __future__ import annotations

import re
from html import escape


class Figure(str):
    """Markup of a figure: a string that notebooks display and templates insert unescaped."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)

    __html__ = _repr_html_

    def __repr__(self) -> str:
        return f"<Figure, {len(self):,} characters>"


_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: object) -> str:
    """``str(text)`` with U+FFFD for every character that XML or UTF-8 cannot encode (controls, lone surrogates)."""
    return _NOT_IN_XML.sub("\ufffd", str(text))


def shorten(text: object, length: int) -> str:
    """``clean(text)``, truncated to ``length`` characters including the ellipsis."""
    whole = clean(text)
    return whole if len(whole) <= length else whole[: length - 1].rstrip() + "…"


def element(name: str, *children: str, **attributes: object) -> str:
    """``<name attributes>children</name>``; children are markup, attribute values are escaped.

    Underscores in attribute names become hyphens, and trailing underscores are dropped (``class_``). None omits an
    attribute.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(pixels(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}/>" if not children else f"<{name}{written}>{''.join(children)}</{name}>"


def picture(width: float, height: float, name: str, *children: str, **attributes: object) -> Figure:
    """A whole inline SVG, scaled down in narrow columns."""
    return Figure(
        element(
            "svg",
            element("title", escape(clean(name))),
            *children,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {pixels(width)} {pixels(height)}",
            width=width,
            height=height,
            role="img",
            **({"style": "display:block;max-width:100%;height:auto"} | attributes),
        )
    )


INK = element("style", "svg{color:#1c2128}@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}")
"""The text color of an SVG file, which cannot inherit the page's: that of a light or a dark page."""


def for_file(figure: str, width: float, height: float, margin: float = 12) -> Figure:
    """A figure of this size with a margin, for a file that light and dark pages show."""
    return picture(
        width + 2 * margin,
        height + 2 * margin,
        "",
        INK,
        element("g", figure, transform=f"translate({margin:g} {margin:g})", font_family="sans-serif"),
    )


def pixels(value: object) -> str:
    """An attribute's value: floats with one decimal at most."""
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return clean(value)
