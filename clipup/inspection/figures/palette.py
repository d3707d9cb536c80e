"""Colours of the report, told apart on white and on near-black, and by colour-blind readers.

The eight were searched for the largest smallest distance in OKLab, as seen with normal sight, protanopia,
deuteranopia and tritanopia (Machado et al. 2009); a test holds the distances.
"""

from __future__ import annotations

EXPERTS = ("#2266aa", "#ff9911", "#bb2266", "#55cc99", "#9966ff", "#aa7700", "#bbaaff", "#5599aa")
"""Colour of expert e is ``EXPERTS[e % 8]``; a second mark (a dash, a dot) tells the second eight from the first."""

ARMS = {"dense": "#949da8", "dense_continued": "#2f68d8", "clip_up": "#e0660a"}
"""Colours of the three training curves."""

DASHES = {"dense": None, "dense_continued": "6 3", "clip_up": None}
"""Dashes of the three training curves, so that they are told apart without colour too."""


def expert_color(expert: int) -> str:
    return EXPERTS[expert % len(EXPERTS)]


def is_second_eight(expert: int) -> bool:
    """Whether the expert shares its colour with an earlier one."""
    return expert >= len(EXPERTS)
