"""Fresh views: every time an image is trained on, it is turned, scaled and moved a little, so that data do not run
out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clipup.data.train_data import TrainData, mixed_seed

_MOST = 0.1
"""The largest change: radians, the share of the size, and the share of half a side."""


class FreshViews:
    """The batches of ``TrainData`` with fresh views, which depend on seed, epoch and number of the batch alone."""

    def __init__(self, data: TrainData, seed: int) -> None:
        self.batches, self.places, self.seed = data.dataloader, data.places, seed

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (images, tokens) in enumerate(self.batches, self.places.first):
            draw = torch.Generator().manual_seed(mixed_seed(self.seed, self.places.epoch, number))
            yield fresh(images, draw), tokens


def fresh(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images [B, C, H, W], each under its own change; pixels from outside are those of the nearest edge."""
    turn, zoom, right, down = _MOST * (2 * torch.rand(4, len(images), generator=draw) - 1)
    cos, sin = turn.cos() / (1 + zoom), turn.sin() / (1 + zoom)
    maps = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
    places = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)
