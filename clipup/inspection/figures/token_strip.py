"""Captions with each token in the color of its expert, as HTML without a style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ..token_words import PADDING, Piece
from . import svg
from .palette import expert_color, is_second_eight
from .svg import Figure

_TINT = "38"  # alpha of the background, in hexadecimal, light enough for text in the page's color
_NO_TEXT = "·"  # shown for a token that holds only the first bytes of a character


def token_strip(caption: Sequence[Piece], experts: Any, label: str = "") -> Figure:
    """A caption's tokens, each underlined and tinted in the color of its first-choice expert, with the expert's number.

    caption: S pieces, from ``clipup.inspection.pieces``. experts [S] or [S, K] integers, the first choice first; the
    others become tooltips, and a token that no expert chose (-1) has no color. Padding is omitted. ``label`` is put in
    front.
    """
    choices = np.asarray(experts)
    choices = choices[:, None] if choices.ndim == 1 else choices
    spans, last_word = [], None
    for piece, of_token in zip(caption, choices, strict=True):
        if piece.word != PADDING:
            spans.append(_span(piece, of_token.tolist(), is_inside_word=piece.word == last_word))
            last_word = piece.word
    head = [svg.element("small", escape(svg.clean(label)), style="opacity:.75;margin-right:8px")] if label else []
    style = "margin:0;line-height:2.2;overflow-wrap:anywhere;text-align:left"
    return Figure(svg.element("div", *head, *spans, "", dir="auto", style=style))


def _span(piece: Piece, choices: list[int], is_inside_word: bool) -> str:
    experts = [expert for expert in choices if expert >= 0]
    look, number, title = "padding:1px 3px;white-space:pre", "", "no expert"
    if experts:
        first = experts[0]
        color, line = expert_color(first), "double" if is_second_eight(first) else "solid"
        look += f";background:{color}{_TINT};border-bottom:3px {line} {color}"
        number = svg.element("sub", str(first), style="font-size:.68em;margin-left:2px;line-height:0")
        title = "expert " + ", then ".join(map(str, experts))
    word = svg.element("span", escape(svg.clean(piece.text)) or _NO_TEXT, number, style=look, title=title)
    return word if is_inside_word else f" {word}"
