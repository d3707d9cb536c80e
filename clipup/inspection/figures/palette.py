"""Colors of the figures, distinguishable on white and on near-black, and for color-blind readers.

The eight were searched for a large smallest distance in OKLab between any two, under normal vision, protanopia,
deuteranopia and tritanopia (Machado et al. 2009), solid and as the tint of a patch; a test holds the distances.
"""

from __future__ import annotations

EXPERTS = ("#2266aa", "#ff9911", "#bb2266", "#00aa88", "#8800ff", "#996600", "#bb66ff", "#88bbee")
"""The color of expert e is ``EXPERTS[e % 8]``; dashes and double lines distinguish 8 to 15 from 0 to 7."""

ARMS = {"dense_continued": "#2f68d8", "clip_up": "#e0660a"}
"""Colors of the two training curves."""

DASHES = {"dense_continued": "6 3", "clip_up": None}
"""Dash patterns of the two training curves, which distinguish them without color."""


def expert_color(expert: int) -> str:
    return EXPERTS[expert % len(EXPERTS)]


def is_second_eight(expert: int) -> bool:
    """Whether the expert shares its color with an earlier expert."""
    return expert >= len(EXPERTS)
