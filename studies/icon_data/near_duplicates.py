"""Finds equal and nearly equal drawings by a perceptual hash.

The hash is that of pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), the 63
lowest frequencies of a 32 x 32 gray image's cosine transform without the constant one, but as integers where pHash
keeps only signs: half of a symmetric drawing's frequencies are 0, and their signs are noise. Two drawings are
near-duplicates if the cosine between their hashes is at least `ALIKE`, whatever their contrast.

A library does not replace it. ImageHash's pHash keeps only signs: a circle and one 2 % larger differ in 30 of its 64
bits, while unrelated drawings like those of the tests differ in as few as 8, so no threshold separates them. It also
needs SciPy and PyWavelets. The search itself is one matrix product per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL.Image import Image, Resampling

from clipup.progress import progress as shown

SIDE = 32
"""Side in pixels of the gray images that are compared."""
ALIKE = 0.98
"""Cosine between the hashes of near-duplicates."""

_LOW = 8
_LENGTH = 1000  # of a hash: products of two stay below 2^24, so float32 sums of integers are exact
_PICTURES, _ROWS = 1 << 15, 512


def grey(picture: Image) -> np.ndarray:
    """An image as uint8 [SIDE, SIDE]."""
    small = picture.convert("L")
    return np.asarray(small if small.size == (SIDE, SIDE) else small.resize((SIDE, SIDE), Resampling.BOX))


def hashes(pictures: np.ndarray) -> np.ndarray:
    """Hashes of uint8 images [N, SIDE, SIDE]: integers as float32 [N, 63], of length 1000 up to rounding (0 for a
    constant image)."""
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


def find_duplicates(pictures: np.ndarray, others: np.ndarray, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which of `pictures` [N, SIDE, SIDE] (uint8) have a duplicate in `others` [M, SIDE, SIDE].

    Returns two bool arrays [N]: has an identical image, and has only a near-duplicate.
    """
    theirs_as_bytes = {other.tobytes() for other in others}
    same = np.array([picture.tobytes() in theirs_as_bytes for picture in pictures], bool)
    near = np.zeros(len(pictures), bool)
    ours, theirs = hashes(pictures), hashes(others)
    for start in shown(range(0, len(pictures), _ROWS), "comparing drawings", f"blocks of {_ROWS}", show=progress):
        closest = (ours[start : start + _ROWS] @ theirs.T).max(axis=1, initial=0)
        near[start : start + _ROWS] = closest >= ALIKE * _LENGTH**2
    return same, near & ~same


def keep_apart(
    splits: Sequence[str], pictures: np.ndarray, apart_from: Mapping[str, Sequence[str]], progress: bool = False
) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Removes held-out drawings that have a duplicate in another split.

    Args:
        splits: the split of each drawing. pictures: uint8 [N, SIDE, SIDE].
        apart_from: for every held-out split, those with which it must share no drawing.

    Returns:
        Which are kept (bool [N]), and the number removed by split: {"same": identical images, "near": near-duplicates}.
    """
    split = np.array(splits)
    kept = np.ones(len(split), bool)
    left_out = {}
    for held_out, others in apart_from.items():
        rows, other_rows = np.flatnonzero(split == held_out), np.flatnonzero(np.isin(split, others))
        same, near = find_duplicates(pictures[rows], pictures[other_rows], progress)
        kept[rows[same | near]] = False
        left_out[held_out] = {"same": int(same.sum()), "near": int(near.sum())}
    return kept, left_out
