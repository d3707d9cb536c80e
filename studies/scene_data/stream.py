"""Training batches of scenes: every step draws new ones, which depend on seed, part and step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipup.data.loaders import describe
from clipup.data.shard_writer import DATASET_FILE, sha256

from .scenes import GROUP, SIDE, Drawings, captions, pictures, sample

DRAWINGS_FILE = "drawings.npz"
RULE = 1
"""Incremented when the same seed and step give other scenes."""
_STEPS = 1000
_TRAINING = 1
"""The last word of the generators' seeds, different from that of scenes for evaluation. Not 0, because numpy ignores
zeros at the end."""


class SceneStream:
    """Batches (images [B, 3, SIDE, SIDE], tokens [B, context_length]) for ``clipup.train.train``, one process, one
    batch a step.

    An epoch is 1,000 steps, and a run can be resumed at any of them.
    """

    def __init__(
        self,
        data: str | Path,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        batch_size: int,
        seed: int = 0,
        part: int = 0,
    ) -> None:
        """
        Args:
            data: directory of the scenes (``studies.scene_data.build``).
            preprocess: PIL image to tensor, the same affine function for every pixel of a channel.
            batch_size: B, a multiple of GROUP.
            part: 0, and another number for every run that follows others with the same seed: its scenes are new too.

        Raises:
            FileNotFoundError, ValueError: the data, or the batch size.
        """
        if batch_size < GROUP or batch_size % GROUP:
            raise ValueError(f"batch_size: got {batch_size}, expected a multiple of {GROUP}, the scenes of a group")
        self.drawings, fingerprint = read_drawings(data)
        self.batch_size, self.seed, self.part, self._tokenizer = batch_size, seed, part, tokenizer
        black, white = (preprocess(Image.new("RGB", (SIDE, SIDE), (tone,) * 3)) for tone in (0, 255))
        self._black, self._range = black[:, :1, :1], (white - black)[:, :1, :1] / 255
        rows = _STEPS * batch_size
        self.order = {
            "rule": f"scenes {RULE}", "rows": rows, "samples": rows, "global_batch": batch_size, "part": part,
            "data": fingerprint,
        }  # fmt: skip
        self._epoch, self._first = 0, 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self._epoch, self._first = epoch, first_step

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self._first, len(self)):
            yield self.batch(self._epoch * len(self) + number)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """A batch, counted from the beginning of the run."""
        draw = np.random.default_rng([self.seed, self.part, number, _TRAINING])
        scenes = sample(draw, self.drawings, self.batch_size // GROUP)
        images = torch.from_numpy(pictures(scenes, self.drawings.masks)).permute(0, 3, 1, 2).float()
        return self._black + images * self._range, self._tokenizer(captions(scenes, self.drawings.names))


def read_drawings(data: str | Path) -> tuple[Drawings, str]:
    """The training drawings of a directory of scenes, and the fingerprint of the data.

    Raises:
        FileNotFoundError, ValueError: it is not such a directory.
    """
    path, dataset = Path(data) / DRAWINGS_FILE, describe(data)
    if [shard["sha256"] for shard in dataset["splits"]["train"]["shards"]] != [sha256(path)]:
        raise ValueError(f"{path} is not the file that {DATASET_FILE} describes: build the scenes again")
    with np.load(path, allow_pickle=False) as content:
        drawings = Drawings(content["masks"], content["counts"], dataset["concepts"])
    return drawings, dataset["fingerprint"]
