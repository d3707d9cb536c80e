"""A card for each expert of a layer: its share, and its strongest patches or words. HTML without a style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import SupportsFloat

from ..token_words import WordShare
from . import svg
from .format import percent
from .images import expert_mark
from .svg import Figure

_GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,215px),1fr));gap:14px 22px"


def patch_cards(first_load: Iterable[SupportsFloat], patches: Sequence[Sequence[str]]) -> Figure:
    """first_load [E] shares of first choices; patches: for each expert figures of ``images.patch``."""
    rows = [
        svg.element("div", *shown, style="display:flex;flex-wrap:wrap;gap:5px") if shown else "" for shown in patches
    ]
    return _cards(first_load, rows, "first choice of no patch")


def word_cards(first_load: Iterable[SupportsFloat], words: Sequence[Sequence[WordShare]]) -> Figure:
    """first_load [E] shares of first choices; words: for each expert those it takes most."""
    return _cards(first_load, [_word_list(shown) for shown in words], "no word more often than its share")


def _cards(first_load: Iterable[SupportsFloat], contents: Sequence[str], nothing: str) -> Figure:
    cards = []
    for expert, (share, content) in enumerate(zip(first_load, contents, strict=True)):
        content = content or svg.element("small", nothing, style="opacity:.75")
        cards.append(svg.element("div", _head(expert, float(share)), content, style="break-inside:avoid"))
    return Figure(svg.element("div", *cards, style=_GRID))


def _head(expert: int, share: float) -> str:
    words = svg.element("span", escape(f"expert {expert}, first choice of {percent(share)}%"))
    style = "display:flex;gap:7px;align-items:center;margin-bottom:5px;font-size:13px"
    return svg.element("div", expert_mark(expert), words, style=style)


def _word_list(shown: Sequence[WordShare]) -> str:
    if not shown:
        return ""
    items = []
    for share in shown:
        word = svg.element("bdi", escape(svg.shorten(share.word, 40)))
        times = svg.element(
            "small", f" {share.taken}/{share.seen}", style="opacity:.7;font-variant-numeric:tabular-nums"
        )
        items.append(svg.element("li", word, times, style="overflow-wrap:anywhere"))
    look = "display:flex;flex-wrap:wrap;gap:0 12px;margin:0;padding:0;list-style:none;line-height:1.5;text-align:left"
    return svg.element("ul", *items, style=look)
