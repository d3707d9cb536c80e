"""Drawings that are the same, or nearly, found by a perceptual hash.

The hash is that of pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), the 63
lowest frequencies of a 32 x 32 grey picture's cosine transform without the constant one, but whole numbers where pHash
keeps signs alone: half of a symmetric drawing's frequencies are 0, and the signs of those are noise. Two drawings are
near-duplicates when the cosine between their hashes is at least `ALIKE`, whatever their contrast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from clipup.progress import progress as shown

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
"""Pixels of the grey pictures that are compared."""
ALIKE = 0.98
"""Cosine between the hashes of near-duplicates."""

_LOW = 8
_LENGTH = 1000  # of a hash: products of two stay below 2^24, where float32 sums whole numbers without rounding
_PICTURES, _ROWS = 1 << 15, 512


def grey(picture: Image) -> np.ndarray:
    """uint8 [SIDE, SIDE] of a picture."""
    from PIL.Image import Resampling

    small = picture.convert("L")
    return np.asarray(small if small.size == (SIDE, SIDE) else small.resize((SIDE, SIDE), Resampling.BOX))


def hashes(pictures: np.ndarray) -> np.ndarray:
    """Hashes of uint8 pictures [N, SIDE, SIDE]: whole numbers as float32 [N, 63], of length 1000 to rounding (0 for a
    picture of one grey)."""
    rows, columns = np.arange(_LOW)[:, None], np.arange(SIDE)[None, :]
    cosines = np.cos(math.pi * rows * (2 * columns + 1) / (2 * SIDE))
    cosines[0] /= math.sqrt(2)
    result = np.empty((len(pictures), _LOW * _LOW - 1), np.float32)
    for start in range(0, len(pictures), _PICTURES):
        part = pictures[start : start + _PICTURES].astype(np.float64)
        low = (cosines @ part @ cosines.T).reshape(len(part), -1)[:, 1:]
        length = np.linalg.norm(low, axis=1, keepdims=True)
        result[start : start + _PICTURES] = np.rint(_LENGTH * low / np.maximum(length, 1e-6))
    return result


def have_twin(pictures: np.ndarray, others: np.ndarray, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which of `pictures` [N, SIDE, SIDE] (uint8) have a twin in `others` [M, SIDE, SIDE].

    Returns two bool arrays [N]: the same to the pixel, and nearly the same (which the former are not).
    """
    known = {other.tobytes() for other in others}
    same = np.array([picture.tobytes() in known for picture in pictures], bool)
    near = np.zeros(len(pictures), bool)
    ours, theirs = hashes(pictures), hashes(others)
    for start in shown(range(0, len(pictures), _ROWS), "comparing drawings", f"blocks of {_ROWS}", show=progress):
        closest = (ours[start : start + _ROWS] @ theirs.T).max(axis=1, initial=0)
        near[start : start + _ROWS] = closest >= ALIKE * _LENGTH**2
    return same, near & ~same
