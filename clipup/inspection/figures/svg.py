"""Elements of SVG and HTML as strings: everything that goes in is escaped, whatever it holds."""

from __future__ import annotations

import re
from html import escape


class Figure(str):
    """Markup of a figure: a string that a notebook shows as the figure, and a template takes as it is."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)

    __html__ = _repr_html_

    def __repr__(self) -> str:
        return f"<Figure, {len(self):,} characters>"


_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: object) -> str:
    """``str(text)`` with U+FFFD for every character that XML and UTF-8 cannot carry (controls, lone surrogates)."""
    return _NOT_IN_XML.sub("\ufffd", str(text))


def shorten(text: object, length: int) -> str:
    """``clean(text)``, cut to ``length`` characters, the last an ellipsis when something was cut."""
    whole = clean(text)
    return whole if len(whole) <= length else whole[: length - 1].rstrip() + "…"


def element(name: str, *children: str, **attributes: object) -> str:
    """``<name attributes>children</name>``; children are markup, attributes are text and are escaped.

    An underscore in an attribute's name stands for a hyphen, one at its end is dropped (``class_``); None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}/>" if not children else f"<{name}{written}>{''.join(children)}</{name}>"


def text(x: float, y: float, content: object, **attributes: object) -> str:
    """An SVG text element in the colour of the text around the figure."""
    return element("text", escape(clean(content)), **({"x": x, "y": y, "fill": "currentColor"} | attributes))


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """An SVG line in the colour of the text around the figure."""
    return element("line", **({"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": "currentColor"} | attributes))


def title(content: object) -> str:
    """The name of a figure or a mark, which browsers show as a tooltip."""
    return element("title", escape(clean(content)))


def picture(width: float, height: float, name: str, *children: str, **attributes: object) -> Figure:
    """A whole inline SVG that shrinks with the column that it stands in."""
    return Figure(
        element(
            "svg",
            title(name),
            *children,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_value(width)} {_value(height)}",
            width=width,
            height=height,
            role="img",
            **({"style": "display:block;max-width:100%;height:auto"} | attributes),
        )
    )


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return clean(value)
