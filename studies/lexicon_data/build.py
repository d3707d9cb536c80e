"""Builds the lexicon data set (`python -m studies lexicon OUT`): icons, each with a random vector as its caption, so
that neither looks nor words give it away and retrieval asks for memory alone.

    OUT/train-*.tar             SET/NAME.png, .txt (SET/NAME)
    OUT/validation-*.tar        fresh views of the first 2,000 (``icon_data.views``), with .json
    OUT/test_views-*.tar        other views of the same
    OUT/vectors.safetensors     the vectors, and the captions (``fixed_texts``)
    OUT/LICENSES.md             makers and licences of the icons data set
    OUT/dataset.json, sizes.json

The same icons data set, options and libraries give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clipup.data.loaders import describe, eval_samples

from .. import data_set, fixed_texts
from ..icon_data import near_duplicates
from ..icon_data.views import fresh

FORMAT = 1
"""Incremented when the same icons and options give a different data set."""
DIMENSIONS = 16
"""Of the vectors: no more than the width of the narrowest model, so that any width can represent them."""
_GALLERY = 2000
_ALIKE = 0.9  # cosine of hashes; views of drawings that are more alike are too hard to tell apart


Drawing = tuple[str, Tensor]
"""An icon of the training split: its key, and uint8 [3, H, W]."""


def build(out: Path, icons: Path, drawings: int, seed: int = 0, overwrite: bool = False) -> dict:
    """Builds the data set in ``out``, or reuses it if it exists, and returns the content of its ``dataset.json``.

    Args:
        icons: directory of the icons data set.
        drawings: number of icons.
        seed: of vectors and views.

    Raises:
        FileNotFoundError: no icons data set.
        ValueError: too few icons; ``out`` holds something else, which is left unchanged.
    """
    options = {"drawings": drawings, "seed": seed, "dimensions": DIMENSIONS}
    source = {"icons": describe(icons)["fingerprint"]}

    def make(directory: Path) -> dict:
        chosen = list(_unlike(icons, drawings))
        draw = torch.Generator().manual_seed(seed)
        vectors = F.normalize(torch.randn(drawings, DIMENSIONS, generator=draw), dim=-1)
        fixed_texts.save(directory, [key for key, _ in chosen], vectors)
        gallery = chosen[:_GALLERY]
        shown = {"train": chosen, "validation": _views(gallery, draw), "test_views": _views(gallery, draw)}
        splits = {split: data_set.write_split(directory, split, map(_sample, of)) for split, of in shown.items()}
        shutil.copyfile(icons / "LICENSES.md", directory / "LICENSES.md")
        return {"splits": splits}

    return data_set.build(out, "lexicon", FORMAT, source, options, overwrite, make)


def _unlike(icons: Path, number: int) -> Iterator[Drawing]:
    """The first training icons, without those that look like an earlier one."""
    hashes, found = np.zeros((number, 63), np.float32), 0
    for picture, _, about in eval_samples(icons / "train-*.tar", pil_to_tensor):
        (own,) = near_duplicates.hashes(near_duplicates.grey(to_pil_image(picture))[None])
        own /= max(float(np.linalg.norm(own)), 1.0)
        if own.any() and (hashes[:found] @ own).max(initial=0) < _ALIKE:
            hashes[found], found = own, found + 1
            yield about["key"], picture
        if found == number:
            return
    raise ValueError(f"drawings: {icons} has only {found} training icons that look different enough, got {number}")


def _views(drawings: list[Drawing], draw: torch.Generator) -> list[Drawing]:
    views = fresh(torch.stack([picture for _, picture in drawings]) / 255, draw)
    pictures = (255 * views).round().to(torch.uint8)
    return [(key, picture) for (key, _), picture in zip(drawings, pictures, strict=True)]


def _sample(drawing: Drawing) -> data_set.Sample:
    key, picture = drawing
    return data_set.Sample(key, data_set.png(to_pil_image(picture)), key, key.split("/")[0])
