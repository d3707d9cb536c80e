"""Captions with each token in the color of its expert, as HTML without a style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..token_words import PADDING, Piece
from .html import html
from .svg import Figure


def token_strip(caption: Sequence[Piece], experts: Any, label: str = "") -> Figure:
    """A caption's tokens, each underlined and tinted in the color of its first-choice expert, with the expert's number.

    caption: S pieces, from ``clipup.inspection.pieces``. experts [S] or [S, K] integers, the first choice first; the
    others become tooltips, and a token that no expert chose (-1) has no color. Padding is omitted. ``label`` is put in
    front.
    """
    choices = np.asarray(experts)
    choices = choices[:, None] if choices.ndim == 1 else choices
    shown = [
        (piece, [expert for expert in of_token if expert >= 0])
        for piece, of_token in zip(caption, choices.tolist(), strict=True)
        if piece.word != PADDING
    ]
    return html("token_strip", tokens=shown, label=label)
